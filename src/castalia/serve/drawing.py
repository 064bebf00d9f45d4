"""The options of a request in the terms of `LanguageModel`."""

from castalia.core.errors import ConfigError
from castalia.inference.language_model import LanguageModel
from castalia.inference.options import Drawing, Options
from castalia.serve.requests import SamplingBody


def options_of(model: LanguageModel, body: SamplingBody, max_tokens: int, slots: int) -> Options:
    """The options of a request's texts; null takes OpenAI's default.

    Takes   slots: those of the server, which bound the beams of a search.
    Raises  ConfigError if an option is not valid for the model.
    """
    drawing = drawing_of(model, body, max_tokens)
    # Scoring a prompt searches for nothing.
    if not body.use_beam_search or max_tokens == 0:
        return model.split_options(drawing)
    if not 1 < body.width <= slots:
        raise ConfigError(
            f"use_beam_search: the number of beams, n or best_of, must be from 2 to {slots}, the"
            f" slots of this server; got {body.width}"
        )
    drawing["temperature"] = 0.0
    drawing["num_beams"] = body.width
    drawing["length_penalty"] = 1.0 if body.length_penalty is None else body.length_penalty
    drawing["early_stopping"] = body.early_stopping or False
    return model.split_options(drawing, body.n or 1)


def drawing_of(model: LanguageModel, body: SamplingBody, max_tokens: int) -> Drawing:
    """The options of a text by itself.

    Raises  ConfigError if the form of the text is not valid, or min_tokens is above max_tokens.
    """
    min_tokens = body.min_tokens or 0
    if min_tokens > max_tokens:
        raise ConfigError(f"min_tokens is {min_tokens}, above max_tokens={max_tokens}")
    form = body.form
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    return Drawing(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        typical_p=body.typical_p or 0.0,
        no_repeat_ngram_size=body.no_repeat_ngram_size or 0,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=bias,
        # An empty list asks for nothing, as in the other lists.
        allowed_token_ids=body.allowed_token_ids or None,
        grammar=None if form is None else form.compiled(model.grammars),
        stop=body.stops,
        stop_token_ids=body.stop_token_ids or [],
        keep_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        min_tokens=min_tokens,
        skip_special=bool(body.skip_special_tokens),
        # None: each text draws with a random seed of its own.
        seed=body.seed,
    )
