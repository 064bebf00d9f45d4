"""What people type after `castalia` that is not a verb, and the verb that they want."""

from collections.abc import Iterable

TRAIN = "castalia train CONFIG"
RESUME = "castalia train RUN, which continues a run from its newest checkpoint"
GENERATE = "castalia generate MODEL"
CHAT = "castalia serve MODEL for chat requests, or castalia generate MODEL, which asks for prompts"
EVALUATE = "castalia eval MODEL --tasks NAME,…"
FINETUNE = "castalia train CONFIG model.start=MODEL, which starts from the weights of a model"
PREPARE = "castalia prepare INPUT... --tokenizer FILE --output PREFIX"
EXPORT = "castalia export MODEL --to hf|native|ct2|gguf"
SHOW = "castalia show CONFIG"
PRESETS = "castalia show, which names the presets; castalia show --keys lists the keys of a config"
LAUNCH = "castalia launch CONFIG, which starts many processes, also through Slurm"
RUNS = "castalia runs [DIR]"
REPORT = "castalia report PATH..."
RESULTS = "castalia results, which imports, asks and compares the numbers of evaluations"
UPLOAD = "castalia upload RUN --repo OWNER/NAME"
HUB = "the hub id of the model, hf://OWNER/NAME, with any verb that takes a model"

WANTED = {
    "evaluate": EVALUATE,
    "evaluation": EVALUATE,
    "lm-eval": EVALUATE,
    "lm_eval": EVALUATE,
    "bench": EVALUATE,
    "benchmark": EVALUATE,
    "chat": CHAT,
    "talk": CHAT,
    "ask": CHAT,
    "api": CHAT,
    "server": CHAT,
    "finetune": FINETUNE,
    "fine-tune": FINETUNE,
    "fine_tune": FINETUNE,
    "sft": FINETUNE,
    "lora": FINETUNE,
    "dpo": FINETUNE,
    "rlhf": FINETUNE,
    "pretrain": TRAIN,
    "fit": TRAIN,
    "run": TRAIN,
    "start": TRAIN,
    "resume": RESUME,
    "continue": RESUME,
    "restart": RESUME,
    "tokenize": PREPARE,
    "preprocess": PREPARE,
    "preprocess_data": PREPARE,
    "process": PREPARE,
    "dataset": PREPARE,
    "tokenizer": PREPARE,
    "infer": GENERATE,
    "inference": GENERATE,
    "predict": GENERATE,
    "complete": GENERATE,
    "completion": GENERATE,
    "sample": GENERATE,
    "prompt": GENERATE,
    "convert": EXPORT,
    "quantize": EXPORT,
    "quantise": EXPORT,
    "save": EXPORT,
    "publish": UPLOAD,
    "push": UPLOAD,
    "download": HUB,
    "pull": HUB,
    "models": PRESETS,
    "presets": PRESETS,
    "recipes": PRESETS,
    "keys": PRESETS,
    "config": SHOW,
    "configs": SHOW,
    "info": SHOW,
    "describe": SHOW,
    "estimate": SHOW,
    "cost": SHOW,
    "flops": SHOW,
    "memory": SHOW,
    "dry-run": SHOW,
    "plan": "castalia show CONFIG --nodes N --gpus-per-node N --gpu NAME",
    "schema": "castalia show --schema",
    "launcher": LAUNCH,
    "submit": LAUNCH,
    "slurm": LAUNCH,
    "sbatch": LAUNCH,
    "torchrun": LAUNCH,
    "deepspeed": LAUNCH,
    "ls": RUNS,
    "list": RUNS,
    "status": RUNS,
    "ps": RUNS,
    "checkpoints": RUNS,
    "plot": REPORT,
    "metrics": REPORT,
    "dashboard": REPORT,
    "tensorboard": REPORT,
    "compare": REPORT,
    "sql": RESULTS,
    "query": RESULTS,
    "scores": RESULTS,
    "leaderboard": RESULTS,
    "logs": REPORT,
    "reports": REPORT,
    "help": "castalia --help",
}
"""Word -> the command for it, and what that does where the command does not say it."""

VERY_ALIKE = 0.7
"""Similarity (difflib's ratio) from which a verb is a hint: `trian` and `train` have 0.8, `test`
and `export` 0.4."""


def unknown_verb(word: str, path: str, verbs: Iterable[str], elsewhere: Iterable[str]) -> str:
    """The message about a `word` after `path` that is none of the `verbs` there.

    `elsewhere` are all verbs of the command line with their groups: `report`, `data view`.
    """
    from castalia.core.errors import nearest

    typed = f"{path} {word}".removeprefix("castalia ")
    text = f"unknown verb {typed!r}"
    # The verb itself in another group, then other tools' words for it, then likeness: a word that
    # means something is no slip of the finger.
    for verb in elsewhere:
        if verb.split()[-1] == word:
            return f"{text}; use castalia {verb}"
    wanted = WANTED.get(word.lower())
    if wanted is not None:
        return f"{text}; use {wanted}"
    menu = f"; choose one of {', '.join(verbs)}"
    return text + (nearest(word, verbs, VERY_ALIKE) or menu)


def unknown_option(option: str, known: Iterable[str], path: str, takes_keys: bool) -> str:
    """The message about an `option` that the verb `path` does not have, with the nearest of its
    `known` ones or, where it takes keys of a config, the key that it may mean.
    """
    from castalia.core.errors import nearest

    text = f"no option {option}"
    # litgpt and Lightning take their file by this option, which looks like our --conf-dir.
    if takes_keys and option == "--config":
        return f"{text}; write the file without it: castalia train FILE.yaml"
    near = nearest(option, known, VERY_ALIKE)
    if near:
        return text + near
    if not takes_keys:
        return f"{text}; {path} --help lists the options"
    from castalia.config.fields import leaves
    from castalia.config.foreign import OURS
    from castalia.runs.config import RunConfig

    name = option.lstrip("-").replace("-", "_")
    keys = [key for key in leaves(RunConfig) if name in (key.replace(".", "_"), key.split(".")[-1])]
    # A name of another trainer has one meaning, where several sections may have a key of its name.
    if name in OURS:
        keys = [OURS[name]]
    if keys:
        choices = " or ".join(f"{key}=VALUE" for key in keys)
        return f"{text}; a key of a config is written without dashes: {choices}"
    return f"{text}; keys of a config are written a.b=c, and castalia show --keys lists them"
