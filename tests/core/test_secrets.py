"""Credentials are recognized by their names, and hidden where something is recorded."""

import pytest

from castalia.core.secrets import is_secret, redacted, redacted_words, without_secrets


def test_names_of_environment_variables():
    secret = """WANDB_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN AWS_ACCESS_KEY_ID
        AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN CASTALIA_API_KEY MLFLOW_TRACKING_PASSWORD
        GOOGLE_APPLICATION_CREDENTIALS PGPASSWORD GITHUB_PAT NPM_AUTH wandb_api_key"""
    assert [name for name in secret.split() if not is_secret(name)] == []
    plain = """NCCL_IB_PKEY UCX_IB_PKEY TOKENIZERS_PARALLELISM CASTALIA_MAX_TOKENS PATH HF_HOME
        PYTHONPATH NCCL_SOCKET_IFNAME AUTHOR COMPAT_MODE AWS_PROFILE"""
    assert [name for name in plain.split() if is_secret(name)] == []
    kept = {"HF_HOME": "/x", "NCCL_IB_PKEY": "1"}
    with_url = {"HTTPS_PROXY": "http://me:pw@proxy:80", "HF_TOKEN": "hf_1"}
    assert without_secrets(kept | with_url) == kept


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pw@host:80/a?b=1", "https://me:***@host:80/a?b=1"),
        ("s3://me:pw@bucket/a", "s3://me:***@bucket/a"),
        ("https://ghp_1@github.com/a", "https://***@github.com/a"),
        ("https://h/a?token=t1&part=2", "https://h/a?token=***&part=2"),
        (
            "https://h/a?X-Amz-Signature=1f&X-Amz-Date=2",
            "https://h/a?X-Amz-Signature=***&X-Amz-Date=2",
        ),
        ("https://h/a?sv=1&sig=x%3D", "https://h/a?sv=1&sig=***"),
        ("WANDB_API_KEY=abc", "WANDB_API_KEY=***"),
        ("ALL,HF_TOKEN=abc,A=b", "ALL,HF_TOKEN=***,A=b"),
        # Neither is a credential.
        ("abfs://container@account/a", "abfs://container@account/a"),
        ("hf://datasets/owner/name@main", "hf://datasets/owner/name@main"),
        ("train.tokens=5 key=text eos_token=<s>", "train.tokens=5 key=text eos_token=<s>"),
        ("https://[broken", "https://[broken"),
    ],
)
def test_texts(text, shown):
    assert redacted(text) == shown


def test_a_command_line():
    words = "castalia x --api-key abc --hub-token=t a.api_key=k --eod TOKEN --key text"
    shown = "castalia x --api-key *** --hub-token=*** a.api_key=*** --eod TOKEN --key text"
    assert " ".join(redacted_words(words.split())) == shown
