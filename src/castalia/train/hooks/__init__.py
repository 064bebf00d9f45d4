"""What happens around the steps: log, save, validate, evaluate, stop. Hooks run in list order."""

from castalia.runs.hook import Hook, Step
from castalia.train.hooks.evaluate import Evaluate
from castalia.train.hooks.metrics import Metrics
from castalia.train.hooks.mirror import MirrorRun
from castalia.train.hooks.profile import Profile
from castalia.train.hooks.record_mixture import RecordMixture
from castalia.train.hooks.save import Save
from castalia.train.hooks.signals import StopOnSignal
from castalia.train.hooks.step_line import StepLine
from castalia.train.hooks.validate import Validate
from castalia.train.hooks.verify_data import VerifyData

__all__ = [
    "Evaluate",
    "Hook",
    "Metrics",
    "MirrorRun",
    "Profile",
    "RecordMixture",
    "Save",
    "Step",
    "StepLine",
    "StopOnSignal",
    "Validate",
    "VerifyData",
]
