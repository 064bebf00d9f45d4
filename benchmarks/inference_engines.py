"""The engines of benchmarks/inference.py: each a process that answers JSON requests, one a line.

    inference_engines.py 'native int8' FOLDER THREADS

Requests: {"prompts", "new"} decodes, {"ids"} scores; every answer has "seconds" and "peak" bytes.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machine import resident_bytes, seconds


class Transformers:
    """Hugging Face transformers with its default generation."""

    def __init__(self, folder: str, numbers: str) -> None:
        import transformers

        self.ready = resident_bytes()
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[numbers]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    @torch.inference_mode()
    def decode(self, prompts: list[list[int]], new: int) -> None:
        """`new` tokens for each prompt."""
        longest = max(map(len, prompts))
        # Padded on the left, as generate reads them.
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
        options = {
            "max_new_tokens": new,
            "min_new_tokens": new,
            "do_sample": False,
            "pad_token_id": 0,
        }
        out = self.model.generate(ids, attention_mask=mask, **options)
        assert out.shape[1] == ids.shape[1] + new

    @torch.inference_mode()
    def score(self, ids: list[int]) -> float:
        """Sum of log-probabilities, computed as in lm-evaluation-harness."""
        tokens = torch.tensor([ids])
        logprobs = self.model(tokens).logits[0, :-1].float().log_softmax(-1)
        return logprobs.gather(1, tokens[0, 1:, None]).sum().item()


class Ct2:
    """CTranslate2 with the faster of one thread and all threads."""

    def __init__(self, folder: str, numbers: str) -> None:
        import ctranslate2

        self.ready = resident_bytes()
        self.names = json.loads((Path(folder) / "vocabulary.json").read_text())
        cores = torch.get_num_threads()
        times = {}
        for threads in sorted({1, cores}):
            self.model = ctranslate2.Generator(
                folder, device="cpu", compute_type=numbers, intra_threads=threads
            )
            self.decode([[5] * 32], 4)
            times[threads] = min(seconds(lambda: self.decode([[5] * 32], 16)) for _ in range(3))
        self.threads = min(times, key=lambda threads: times[threads])
        self.model = ctranslate2.Generator(
            folder, device="cpu", compute_type=numbers, intra_threads=self.threads
        )

    def decode(self, prompts: list[list[int]], new: int) -> None:
        """`new` tokens for each prompt."""
        results = self.model.generate_batch(
            [[self.names[i] for i in ids] for ids in prompts],
            max_length=new,
            min_length=new,
            include_prompt_in_result=False,
            sampling_topk=1,
        )
        assert all(len(row.sequences_ids[0]) == new for row in results)

    def score(self, ids: list[int]) -> float:
        """Sum of log-probabilities."""
        (result,) = self.model.score_batch([[self.names[i] for i in ids]], max_input_length=0)
        return float(sum(result.log_probs))


class OpenVino:
    """OpenVINO over Castalia's graph, all rows in one request, with greedy choice here."""

    def __init__(self, folder: str, numbers: str) -> None:
        import openvino.op.util

        import castalia
        from castalia.inference import loading, openvino_engine

        self.ready = resident_bytes()
        assert loading and openvino.op.util
        self.engine = castalia.load(folder, engine="openvino", dtype=numbers).engine
        self.read = openvino_engine.read

    def decode(self, prompts: list[list[int]], new: int) -> None:
        """`new` tokens for each prompt."""
        if len({len(row) for row in prompts}) > 1:
            # Its graph has no padding.
            for row in prompts:
                self.decode([row], new)
            return
        request = self.engine.compiled.create_infer_request()
        rows = prompts
        known = 0
        for _ in range(new):
            logits = self.read(request, rows, known, [len(rows[0]) - 1])
            logits = logits[:, 0, : self.engine.config.vocab_size]
            known += len(rows[0])
            rows = logits.numpy().argmax(1)[:, None].tolist()

    def score(self, ids: list[int]) -> float:
        """Sum of log-probabilities."""
        return float(self.engine.logprobs(ids).sum())


class Ours:
    """A Castalia engine: native, or llama.cpp through the adapter that calls its C functions."""

    def __init__(self, folder: str, numbers: str) -> None:
        import castalia
        from castalia.inference import loading

        if "gguf" in folder:
            from castalia.inference.llama_cpp import llama

            llama()
        self.ready = resident_bytes()
        assert loading
        # The numbers by their name are the arithmetic of decoding and scoring alike.
        self.model = castalia.load(folder, dtype=numbers)
        self.engine = self.model.engine
        self.threads = torch.get_num_threads()
        if "gguf" in folder:
            self.choose_threads()

    def choose_threads(self) -> None:
        """Choose the faster of one thread and all threads for llama.cpp."""
        times = {}
        for threads in sorted({1, self.threads}):
            torch.set_num_threads(threads)
            self.decode([[5] * 32], 4)
            times[threads] = min(seconds(lambda: self.decode([[5] * 32], 16)) for _ in range(3))
        self.threads = min(times, key=lambda threads: times[threads])
        torch.set_num_threads(self.threads)

    def decode(self, prompts: list[list[int]], new: int) -> None:
        """`new` tokens for each prompt."""
        from castalia.inference.continuing import decode_texts
        from castalia.inference.decoding import begin
        from castalia.inference.sampling import Sampling
        from castalia.tokenizers.special_ids import SpecialIds

        # Without ends of a text, so that every engine writes as many tokens.
        special = SpecialIds()
        options = {"max_new_tokens": new, "limit": 2048, "special": special, "decode": no_text}
        rows = [begin(ids, **options) for ids in prompts]
        for _ in decode_texts(self.engine, rows, Sampling()):
            pass
        assert all(len(row.tokens) == new for row in rows)

    def score(self, ids: list[int]) -> float:
        """Sum of log-probabilities."""
        return float(self.engine.logprobs(ids).sum())


def no_text(ids: list[int]) -> str:
    """The text of any ids: only the ids are measured."""
    return ""


def serve(engine: str, folder: str, threads: int) -> None:
    """Answer the requests on stdin, one JSON object a line."""
    torch.set_num_threads(threads)
    family, numbers = engine.split()
    kinds: dict[str, Any] = {"transformers": Transformers, "ct2": Ct2, "openvino": OpenVino}
    running = kinds.get(family, Ours)(folder, numbers)
    hello = {
        "loaded": resident_bytes() - running.ready,
        "threads": getattr(running, "threads", threads),
        "scores_in": getattr(getattr(running, "engine", None), "scoring", None),
    }
    print(json.dumps(hello), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        answer: dict[str, Any] = {}
        if "prompts" in asked:
            decode = partial(running.decode, asked["prompts"], asked["new"])
            answer["seconds"] = seconds(decode)
        else:
            start = time.perf_counter()
            answer["sum"] = running.score(asked["ids"])
            answer["seconds"] = time.perf_counter() - start
        answer["peak"] = resident_bytes("VmHWM") - running.ready
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
