"""Rules for GPT-NeoX's mixture of experts: the options of its newest version, and those of before.

Until June 2025 experts were those of DeepSpeed or Megablocks, with token dropping and an auxiliary
loss; the options of that time choose its defaults. Since then they are dropless without a loss.
Source  GPT-NeoX, megatron/model/{moe,moe_mlp,router,transformer}.py at ea7aefd8, and transformer.py
        and neox_args.py at 4c9f1081.
"""

from castalia.config.neox_attention import UNGATED, has_attention
from castalia.config.neox_keys import HONOURED
from castalia.config.neox_model import PLAIN, named_width, rounded_up
from castalia.config.neox_reading import NeoxOptions, NeoxReading, OptionRule, note, wrong

BEFORE = (
    *("moe_type", "moe_token_dropping", "moe_train_capacity_factor", "moe_eval_capacity_factor"),
    *("moe_min_capacity", "moe_loss_coeff", "moe_use_residual", "moe_expert_parallel_size"),
    *("enable_expert_tensor_parallelism", "expert_interval"),
)
"""Options that GPT-NeoX had until June 2025."""
SINCE = ("moe_router_type", "moe_expert_interval")
"""Options that it has since then."""
BOTH = ("moe_num_experts", "moe_top_k", "moe_jitter_eps")
CAPACITIES = ("moe_train_capacity_factor", "moe_eval_capacity_factor", "moe_min_capacity")
ROUTERS = ("sinkhorn", "topk")
TYPES = ("deepspeed", "megablocks")
EXPERT_MULTIPLE = 256
"""Unit of the width of an expert without intermediate_size; moe_mlp.py, multiple_of."""
MEGABLOCKS_WIDTH = 4096
"""Default of Megablocks' ffn_hidden_size, an option that GPT-NeoX does not have."""


def experts(o: NeoxOptions, out: NeoxReading) -> None:
    """The section `model.moe`, if there is more than one expert."""
    # Over a preset without that option the preset has experts, or refuses the keys.
    counted = o.complete or o.has("moe_num_experts")
    if counted and (o["moe_num_experts"] < 2 or not has_attention(o)):
        ignore(o, out, "no layer has experts", *BEFORE, *SINCE, *BOTH[1:])
        return
    put(o, out, "experts", o["moe_num_experts"])
    put(o, out, "top_k", o["moe_top_k"], "moe_top_k")
    put(o, out, "interval", interval(o, out), "moe_expert_interval", "expert_interval")
    if any(o.has(name) for name in BEFORE):
        experts_before(o, out)
    else:
        experts_now(o, out)
    if o["gpt_j_residual"] and o.has("moe_num_experts"):
        note(
            out,
            "gpt_j_residual with experts: GPT-NeoX drops the attention's output in such layers,"
            " here it counts",
            "model.parallel_residual",
        )


def put(o: NeoxOptions, out: NeoxReading, key: str, value: object, *names: str) -> None:
    """Set a key of `model.moe`: all of them with moe_num_experts, else what a file gives."""
    o.put(out, f"model.moe.{key}", value, *names, "moe_num_experts")


def ignore(o: NeoxOptions, out: NeoxReading, why: str, *names: str) -> None:
    """List those of the options that a file gives as ignored."""
    given = [name for name in names if o.has(name)]
    if given:
        out.ignored.setdefault(why, []).extend(given)


def interval(o: NeoxOptions, out: NeoxReading) -> int:
    """Every how many layers one has experts; both names count from the first layer."""
    both = [name for name in ("expert_interval", "moe_expert_interval") if o.has(name)]
    if len(both) > 1 and o["expert_interval"] != o["moe_expert_interval"]:
        wrong(
            out,
            f"expert_interval is {o['expert_interval']} and moe_expert_interval"
            f" {o['moe_expert_interval']}, the old and the new name of one option; keep one",
            "model.moe.interval",
        )
    if both:
        return int(o[both[0]])
    before = any(o.has(name) for name in BEFORE)
    return int(HONOURED["expert_interval" if before else "moe_expert_interval"].default)


def experts_now(o: NeoxOptions, out: NeoxReading) -> None:
    """Dropless, without a loss that balances; Sinkhorn's router unless the file says topk."""
    router = o["moe_router_type"]
    put_router(o, out, router)
    # The weight of a single choice is its sigmoid, of several their softmax among all.
    alone = router == "sinkhorn" and o["moe_top_k"] == 1
    put(o, out, "scores", "sigmoid" if alone else "softmax", "moe_router_type", "moe_top_k")
    put(o, out, "balance_loss", 0.0)
    put(o, out, "bias", False)
    if router == "topk":
        put(o, out, "jitter", o["moe_jitter_eps"], "moe_jitter_eps")
    else:
        ignore(o, out, "only moe_router_type topk reads it", "moe_jitter_eps")
    if o.has("moe_num_experts"):
        expert_width(o, out)
    if o["model_parallel_size"] > 1 and o.has("moe_num_experts"):
        put(o, out, "split_over_tp", True)
        note(
            out,
            "model.moe.split_over_tp: each rank of model_parallel_size has a part of every expert,"
            " where GPT-NeoX gives it some of the experts; the sums and the memory are the same",
            "model.moe.split_over_tp",
        )


def put_router(o: NeoxOptions, out: NeoxReading, router: str) -> None:
    """The router; Sinkhorn's balances the tokens of a rank's micro-batch, as in GPT-NeoX."""
    if router not in ROUTERS:
        wrong(
            out,
            f"unknown moe_router_type {router!r}; choose one of {', '.join(ROUTERS)}",
            "model.moe.router",
        )
        return
    put(o, out, "router", router, "moe_router_type")
    if router == "sinkhorn":
        put_pass(o, out, "the Sinkhorn router balances")


def put_pass(o: NeoxOptions, out: NeoxReading, what: str) -> None:
    """Tokens are balanced among all of a rank's micro-batch."""
    put(o, out, "group", "pass", "moe_router_type", "moe_token_dropping")
    note(
        out,
        f"model.moe.group is pass: {what} the tokens of a rank's micro-batch, as in GPT-NeoX, so"
        " the numbers depend on train.micro_batch_size; model.moe.group=row makes them the same on"
        " any layout",
        "model.moe.group",
    )


def expert_width(o: NeoxOptions, out: NeoxReading) -> None:
    """Width of an expert, which has no gate, whatever the activation.

    Source  GPT-NeoX, megatron/model/moe_mlp.py, ParallelGroupedMLP: intermediate_size as it is, or
            4 * hidden_size rounded up to a multiple of 256.
    """
    if not o.has("hidden_size"):
        return
    width = o["intermediate_size"] or rounded_up(4 * o["hidden_size"], EXPERT_MULTIPLE)
    activation = o["activation"]
    dense = out.values["model"].get("intermediate_size", 4 * o["hidden_size"])
    if activation in PLAIN and width != dense:
        put(o, out, "expert_size", width, "intermediate_size")
    if activation in PLAIN:
        return
    put(o, out, "expert_size", width, "intermediate_size")
    every = interval(o, out) == 1
    if activation in UNGATED and every:
        function = UNGATED[activation]
        o.put(out, "model.activation", function, "activation")
        note(
            out,
            f"model.activation is {function}: GPT-NeoX's experts have the function of {activation}"
            f" without its gate, and all layers have experts; model.activation={activation} gates"
            " them",
            "model.activation",
        )
        return
    wrong(
        out,
        f"activation {activation} with moe_num_experts: GPT-NeoX's experts have no gate, its other"
        " MLPs have one, which is not supported; set model.activation to swiglu or another gated"
        " function for both, or to silu or another plain one",
        "model.activation",
    )


def experts_before(o: NeoxOptions, out: NeoxReading) -> None:
    """The experts of DeepSpeed or Megablocks."""
    kind = o["moe_type"]
    if kind not in TYPES:
        wrong(out, f"unknown moe_type {kind!r}; choose one of {', '.join(TYPES)}", "model.moe")
        return
    if o.has("moe_router_type"):
        put_router(o, out, o["moe_router_type"])
    else:
        put(o, out, "router", "topk")
    put(o, out, "scores", "softmax")
    balance(o, out)
    capacities(o, out)
    put(
        o,
        out,
        "split_over_tp",
        o["enable_expert_tensor_parallelism"],
        "enable_expert_tensor_parallelism",
    )
    # One expert group is the default here as well; over a preset the file may take it back.
    if o["moe_expert_parallel_size"] > 1 or not o.complete:
        size = o["moe_expert_parallel_size"]
        o.put(out, "parallel.ep", size, "moe_expert_parallel_size")
    if kind == "deepspeed":
        deepspeed(o, out)
    else:
        megablocks(o, out)


def balance(o: NeoxOptions, out: NeoxReading) -> None:
    """The coefficient of the loss that balances, which has a gradient here."""
    put(o, out, "balance_loss", o["moe_loss_coeff"], "moe_loss_coeff")
    if o["moe_loss_coeff"] and o.has("moe_num_experts"):
        note(
            out,
            f"moe_loss_coeff {o['moe_loss_coeff']:g} trains the routers here; GPT-NeoX adds the"
            " loss without its gradient, as model.moe.balance_loss=0 does",
            "model.moe.balance_loss",
        )


def capacities(o: NeoxOptions, out: NeoxReading) -> None:
    """Most tokens of an expert, with moe_token_dropping."""
    if not o["moe_token_dropping"]:
        # Over a preset the file may turn dropping off.
        put(o, out, "capacity_factor", None, "moe_token_dropping")
        put(o, out, "eval_capacity_factor", None, "moe_token_dropping")
        ignore(o, out, "without moe_token_dropping no token is dropped", *CAPACITIES)
        return
    train, evaluation, least = CAPACITIES
    for name in (train, evaluation):
        if o[name] <= 0:
            wrong(out, f"{name} {o[name]:g} drops every token; write 1.0", "model.moe")
            return
    put(o, out, "capacity_factor", o[train], train, "moe_token_dropping")
    put(o, out, "eval_capacity_factor", o[evaluation], evaluation, "moe_token_dropping")
    put(o, out, "min_capacity", o[least], least)
    put_pass(o, out, "the capacity of an expert counts")


def deepspeed(o: NeoxOptions, out: NeoxReading) -> None:
    """Weights of several experts sum to 1, and an MLP beside the experts is mixed in by default."""
    put(o, out, "normalize", o["moe_top_k"] > 1, "moe_top_k")
    put(o, out, "residual", o["moe_use_residual"], "moe_use_residual")
    put(o, out, "bias", o["use_bias_in_mlp"], "use_bias_in_mlp")
    ignore(o, out, "moe_type deepspeed never reads it; set model.moe.jitter", "moe_jitter_eps")
    if not o.has("moe_num_experts"):
        return
    if o["moe_use_residual"] and not o.has("moe_use_residual"):
        note(
            out,
            "model.moe.residual: moe_use_residual is not given and GPT-NeoX's default is true,"
            " which mixes an MLP for all tokens with the experts",
            "model.moe.residual",
        )
    # With a capacity it is drawn here, too.
    if o["moe_top_k"] == 2 and not o["moe_token_dropping"]:
        note(
            out,
            "moe_top_k 2 takes the two experts with the greatest scores; DeepSpeed draws the second"
            " with Gumbel noise",
            "model.moe.top_k",
        )


def megablocks(o: NeoxOptions, out: NeoxReading) -> None:
    """Weights are the probabilities as they are; GPT-NeoX hands over few of its options."""
    put(o, out, "normalize", False)
    put(o, out, "bias", False)
    put(o, out, "jitter", o["moe_jitter_eps"], "moe_jitter_eps")
    ignore(o, out, "only moe_type deepspeed reads it", "moe_use_residual")
    if o.has("hidden_size") and named_width(o) != MEGABLOCKS_WIDTH:
        note(
            out,
            f"experts have the width of the MLP; GPT-NeoX gives Megablocks none, whose default is"
            f" {MEGABLOCKS_WIDTH}, as model.moe.expert_size={MEGABLOCKS_WIDTH}",
            "model.moe.expert_size",
        )


KEYS = (*BOTH, *SINCE, *BEFORE)
assert set(KEYS) <= set(HONOURED)
EXPERT_RULES: list[tuple[tuple[str, ...], OptionRule]] = [(KEYS, experts)]
"""The options that the rule reads, and the rule."""
