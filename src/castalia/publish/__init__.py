"""A run as a repository of the Hugging Face hub: a branch for each checkpoint, as Pythia has it."""

from castalia.publish.options import UploadOptions
from castalia.publish.suites import upload
from castalia.publish.uploading import Revision

__all__ = ["Revision", "UploadOptions", "upload"]
