"""The documents' tables, as data; what a table is says `table`."""

from quantkit.evals.benchmarks.table import Pick, Printed, Table
from quantkit.evals.benchmarks.tables_runs import (
    ARCHITECTURES,
    CHECKSUMS,
    DAMAGE,
    DRAFTS,
    DRY_RUN,
    EXCHANGE,
    EXCHANGE_REAL,
    EXPERTS,
    EXPERTS_MEMORY,
    FAULTS,
    FINETUNE_MEMORY,
    FORMS,
    GIANTS,
    GRIDS,
    KV_MEMORY,
    MEMORY,
    PREDICTIONS,
    REAL_MODEL,
    REFERENCE_ROWS,
    SEARCH_REAL,
    SETTINGS,
    SHARED,
    SHRINKAGE,
    STORED_MEMORY,
    VERSIONS,
    VLLM,
    VLLM_REAL,
)

KL = "{kl:k.2f} +- {kl_se:k.2f}"
KL1 = "{kl:k.1f} +- {kl_se:k.1f}"
BITS = "{bits_per_weight:.3f}"
BLANK = ("",)

INTEGERS = Table(
    file="2026-11-21-cpu-reference-quality.json",
    head="method | bits/weight | perplexity | KL x 1000",
    cells=(BITS, "{perplexity:.3f}", KL),
    rows={
        f"{label}, {bits} bits": [{"method": method, "target_shift": shift, "bits": bits}]
        for bits in (2, 3, 4, 8)
        for label, method, shift in (
            ("RTN", "rtn", 0),
            ("GPTQ, target shift 0", "gptq", 0),
            ("**GPTQ, target shift 0.7** (default)", "gptq", 0.7),
        )
    },
)

HEAD_BITS = Table(
    "2026-11-28-cpu-head-bits.json", "head and embedding | MiB of the weight files | KL x 1000", ("{bytes:M.2f}", KL1),
    {f"`--head-bits {bits}`" if bits else "dense": [{"head_bits": bits}] for bits in (0, 6, 4)}, "rows",
)  # fmt: skip

TARGET_SHIFT = Table(
    file="2026-11-21-cpu-target-shift-sweep.json",
    head="calibration tokens | shift 0 | 0.5 | **0.7** | 0.85 | 1",
    cells=("{kl:k.0f}",),
    rows={
        f"{samples * 512 / 1000:.0f} k ({samples} sequences)": [
            {"num_samples": samples, "target_shift": shift} for shift in (0, 0.5, 0.7, 0.85, 1)
        ]
        for samples in (16, 64, 256)
    },
)

METHODS = Table(
    file="2026-11-22-cpu-quality.json",
    head="method | bits/weight | KL | bits/weight | KL | bits/weight | KL",
    cells=(BITS, KL1),
    rows={
        row: [{"label": label.format(bits)} for bits in (2, 3, 4)]
        for row, label in (
            ("RTN", "RTN(bits {})"),
            ("GPTQ", "GPTQ(bits {})"),
            ("GPTQ `--hadamard`", "Hadamard(GPTQ(bits {}))"),
            ("pyramid", "Hadamard(Pyramid(bits {}))"),
            ("VPTQ", "Hadamard(VPTQ(bits {}))"),
            ("trellis, `--state-bits 12`", "Hadamard(Trellis(bits {}, state_bits 12))"),
            ("**trellis**", "Hadamard(Trellis(bits {}))"),
        )
    }
    | {"trellis, `--bits 2.09`": [{"label": "Hadamard(Trellis(bits 2.09))"}, *BLANK * 4]},
)

METHODS_TIME = Table(
    file="2026-11-22-cpu-quality.json",
    head="seconds | 2 bits | 3 bits | 4 bits",
    cells=("{seconds:.0f}",),
    rows={
        row: [{"label": label.format(bits)} for bits in (2, 3, 4)]
        for row, label in (
            ("GPTQ", "GPTQ(bits {})"),
            ("GPTQ `--hadamard`", "Hadamard(GPTQ(bits {}))"),
            ("pyramid", "Hadamard(Pyramid(bits {}))"),
            ("VPTQ", "Hadamard(VPTQ(bits {}))"),
            ("trellis, `--state-bits 12`", "Hadamard(Trellis(bits {}, state_bits 12))"),
            ("trellis", "Hadamard(Trellis(bits {}))"),
        )
    },
)

TRELLIS_PARTS = Table(
    file="2026-11-22-cpu-trellis.json",
    head="change | bits/weight | KL",
    cells=(BITS, KL1),
    where={"target_shift": 0.7, "windows": 128},
    rows={
        "none": [{"label": "Hadamard(Trellis(bits 2, state_bits 12))"}],
        "sequences in tiles, `trellis(2, 12, axis='in')`": [
            {"label": "Hadamard(Trellis(bits 2, state_bits 12, axis in))"}
        ],
        "columns in their own order, `order='none'`": [
            {"label": "Hadamard(Trellis(bits 2, state_bits 12, order none))"}
        ],
        "outputs not rotated, `hadamard(..., outputs=False)`": [
            {"label": "Hadamard(Trellis(bits 2, state_bits 12), outputs False)"}
        ],
        "no rotation, `trellis(2, 12)`": [{"label": "Trellis(bits 2, state_bits 12)"}],
    },
)

TRELLIS_SHIFT = Table(
    "2026-11-22-cpu-trellis.json", "target shift | 0 | 0.5 | **0.7** (default) | 0.85 | 1", (KL1,),
    {"KL": [{"target_shift": shift} for shift in (0, 0.5, 0.7, 0.85, 1)]}, where={"windows": 64},
)  # fmt: skip

TRELLIS_CODES = Table(
    file="2026-11-22-cpu-trellis-codes.json",
    at="values",
    head="values of 2^16 states | instructions a weight | error at 2 bits | 3 bits | 4 bits",
    cells=("{mse:.5f}",),
    where={"state_bits": 16},
    rows={
        row: [
            Pick({"what": what, "bits": 2}, ("{cost:.2f}", "{mse:.5f}")),
            {"what": what, "bits": 3},
            {"what": what, "bits": 4},
        ]
        for row, what in (
            ("**two bf16, added by the tensor core** (here)", "quantkit*"),
            ("3INST: two fp16 (QTIP)", "3INST*"),
            ("1MAD: sum of four bytes (QTIP)", "1MAD*"),
            ("sum of four bytes, no increment", "mul1*"),
            ("table of 2^16 quantiles", "table*"),
        )
    },
)

VECTORS = Table(
    file="2026-11-21-cpu-vector-quality.json",
    head="method | bits/weight | perplexity | KL x 1000 | bits/weight | perplexity | KL x 1000",
    cells=(BITS, "{perplexity:.3f}", KL),
    rows={
        row: [{"quantizer": pattern, "bits": bits} for bits in several] + [*BLANK * 3 * (2 - len(several))]
        for row, pattern, several in (
            ("GPTQ", "GPTQ*", (2, 3)),
            ("GPTQ `--hadamard`", "Hadamard(inner=GPTQ*", (2, 3)),
            ("**VPTQ**", "Hadamard(inner=VPTQ*", (2, 3)),
            ("VPTQ `--no-hadamard`", "VPTQ*", (2,)),
            ("**pyramid** (default: groups of 8 at 2 bits, of 32 above)", "*Pyramid(bits=?, dimension=None*", (2, 3)),
            ("pyramid, groups of 16", "*Pyramid(bits=2, dimension=16*", (2,)),
            ("pyramid, groups of 32", "*Pyramid(bits=2, dimension=32*", (2,)),
        )
    },
)

RATE_DISTORTION = Table(
    file="2026-11-22-cpu-rate-distortion.json",
    at="rows",
    head="code | 2 bits | 3 bits | 4 bits",
    cells=("{mse:.4f}",),
    rows={"Shannon's bound, 4^-bits": [f"{4**-bits:.4f}" for bits in (2, 3, 4)]}
    | {
        row: [{"family": family, "rate": bits} for bits in (2, 3, 4)]
        for row, family in (
            ("**trellis**, 2^16 states", "trellis L=16"),
            ("trellis, 2^12 states", "trellis L=12"),
            ("pyramid, D = 64", "PVQ D=64"),
            ("pyramid, D = 32", "PVQ D=32"),
            ("pyramid, D = 16", "PVQ D=16"),
            ("pyramid, D = 8", "PVQ D=8"),
        )
    }
    | {
        "k-means, v = 6, 4,096 (2 bits); v = 4, 4,096 (3); v = 3, 4,096 (4)": [
            {"family": "VQ v6 k4096"},
            {"family": "VQ v4 k4096"},
            {"family": "VQ v3 k4096"},
        ],
        "k-means, v = 4, 256 (2 bits)": [{"family": "VQ v4 k256"}, *BLANK * 2],
        "Lloyd-Max": [{"family": "Lloyd-Max", "rate": bits} for bits in (2, 3, 4)],
        "integer grids of 128, searched (+0.125 bit)": [
            {"family": "INT g128 symmetric, searched", "rate": bits} for bits in (2, 3, 4)
        ],
    },
)

ACTIVATIONS = Table(
    file="2026-11-21-cpu-activations.json",
    head="bits per activation | integers per token | integers, fitted range, Hadamard | **pyramid, Hadamard**",
    cells=("{kl:k.2f}",),
    rows={
        f"{bits}": [
            {"method": method, "hadamard": hadamard, "bits": bits}
            for method, hadamard in (("int", False), ("int-fitted", True), ("pyramid", True))
        ]
        for bits in (2, 3, 4, 6, 8)
    },
)

CPU_PRODUCTS = Table(
    file="2026-11-28-cpu-products.json",
    at="timings",
    head="weight, one row of x | 4096 x 4096 | 14336 x 4096",
    cells=("{ratio:.2f}",),
    rows={
        what: [{"what": what, "case": f"{shape}, 1 rows"} for shape in ("4096 x 4096", "14336 x 4096")]
        for what in (
            *("int4", "int3", "int2", "int8", "int4 groups of 32", "trellis 2", "trellis 3", "trellis 4"),
            *("codebook v4 8 bits", "codebook v4 12 bits", "codebook v8 8+8 bits"),
        )
    },
)

CPU_MODELS = Table(
    file="2026-11-28-cpu-models.json",
    at="timings",
    head="model | generating, by default | all packed | reading, by default | all packed",
    cells=("{ratio:.2f}",),
    rows={
        row: [
            {"what": f"{what}, {way}", "case": f"{case}*"}
            for case in ("generate", "read")
            for way in ("by default", "all packed")
        ]
        for row, what in (
            ("reference model, GPTQ 3 bits", "reference-3bit"),
            ("reference model, trellis 2 bits", "trellis2"),
            ("SmolLM2-135M's shape, 3 bits", "int3"),
            ("SmolLM2-135M's shape, trellis 2 bits", "trellis 2"),
        )
    },
)

KV_CACHE = Table(
    file="2026-11-22-cpu-kv-cache.json",
    at="rows",
    head="mode | code bits | true bits | KL x 1000 | retrieval | with outliers: KL x 1000 | retrieval",
    cells=(KL, "{retrieval:c.1f}"),
    rows={
        f"{row} | {wider[bits] if mode == 'KIVI, keys a width more' else bits}": [
            Pick({"mode": mode, "bits": bits, "factor": 1}, ("{true_bits:.2f}", KL, "{retrieval:c.1f}")),
            {"mode": mode, "bits": bits, "factor": 8},
        ]
        for wider in ({2: "3/2", 3: "4/3", 4: "8/4"},)
        for bits in (2, 3, 4)
        for row, mode in (
            *((mode, mode) for mode in ("per token", "per token, groups of 32", "per token, Hadamard", "KCVT", "KIVI")),
            *((mode, mode) for mode in ("KIVI, groups of 32", "KIVI, keys a width more", "GEAR-L as published")),
            *((mode, mode) for mode in ("GEAR as published", "GEAR, keys' rank in the prompt's basis")),
            ("**... weighted by queries** (`gear(bits)`)", "... weighted by queries (default)"),
        )
    },
)

SEARCH = Table(
    file="2026-11-22-cpu-search.json",
    at="rows",
    head="bits/weight | uniform | best of 32 random | greedy on errors | knapsack on errors | greedy, measured "
    "| knapsack, measured | **search**",
    cells=tuple(
        f"{{kl[{way}][0]:k.1f}} +- {{kl[{way}][1]:k.1f}}"
        for way in (
            *("uniform", "random, best of 32", "greedy", "knapsack", "greedy, measured", "knapsack, measured"),
            "search",
        )
    ),
    rows={f"{bits}": [{"bits": bits}] for bits in (2.25, 2.5, 3, 3.14, 4)},
)

TUNED = Table(
    file="2026-11-22-cpu-pv.json",
    at="gptq",
    head="GPTQ at 2 bits | bits/weight | KL x 1000",
    cells=(BITS, KL1),
    rows={
        "as it is (128 calibration sequences)": [{"label": "GPTQ, 128*"}],
        "blocks tuned, then 1,500 steps of 4 sequences": [{"label": "blocks tuned in 100 steps*"}],
        "then 300 steps at lower rates": [{"label": "the same, then 300 steps*"}],
    },
)

TUNED_VPTQ = Table(
    file="2026-11-22-cpu-pv.json",
    at="vptq",
    head="VPTQ at 2 bits | bits/weight | KL x 1000",
    cells=(BITS, KL1),
    rows={
        "as it is": [{"label": "VPTQ"}],
        "tuned for 600 steps of 4 sequences": [{"label": "VPTQ, PV-Tuning"}],
    },
)

AUTO_ROUND = Table(
    file="2026-11-22-cpu-pv.json",
    head="KL x 1000, groups of 64 | 3 bits | 4 bits",
    cells=(KL1,),
    rows={
        row: [Pick({"name": name}, at=f"auto_round_{bits}_bits_groups_of_64") for bits in (3, 4)]
        for row, name in (
            ("auto-round 0.16.1", "auto-round*"),
            ("GPTQ", "GPTQ"),
            ("GPTQ, blocks tuned (200 steps at 3 bits, 100 at 4)", "GPTQ, blocks*"),
        )
    },
)

LOW_RANK = Table(
    file="2026-11-21-cpu-low-rank.json",
    head="rank | bits/weight | plain | diagonal | exact",
    cells=(KL1,),
    rows={
        "none": [Pick({"label": "GPTQ"}, (BITS, KL1)), *BLANK * 2],
        **{
            f"{rank}": [
                Pick({"label": f"GPTQ, rank {rank}, plain"}, (BITS, KL1)),
                {"label": f"GPTQ, rank {rank}, diagonal"},
                {"label": f"GPTQ, rank {rank}, exact"},
            ]
            for rank in (1, 4, 16)
        },
    },
)

LREC = Table(
    file="2026-11-21-cpu-lrec.json",
    head="correction of GPTQ at 2 bits | bits/weight | KL x 1000",
    cells=(BITS, KL1),
    rows={
        "none": [{"label": "GPTQ"}],
        "rank 1, closed form": [{"label": "GPTQ, rank 1, exact"}],
        "rank 1, trained (LREC)": [{"label": "*LREC*"}],
    },
)

BUILDS = "kernel-build-triton-3.7.1.json"
INSTRUCTIONS = "{instructions_per_weight:.2f}"
PIPES = (INSTRUCTIONS, "{alu_per_weight:.2f}", "{fma_per_weight:.2f}")

KERNELS = Table(
    file=BUILDS,
    at="builds",
    head="instructions a weight in the inner loop, sm_90, bf16, groups of 128 | up to 8 rows | 16 rows | 32 rows",
    cells=(INSTRUCTIONS,),
    rows={
        row: [{"name": f"{name} M={rows} bf16 sm_90"} for rows in (8, 16, 32)]
        for row, name in (
            *((f"{bits} bits", f"decode int{bits} g128") for bits in (2, 3, 4, 8)),
            ("pyramid as integers of 4 bits, groups of 16 or more", "pyramid factored D=32 4 bits"),
            ("pyramid, table of points of 8", "pyramid table D=8 16 bits"),
            ("codebook, 256 vectors of 4 (2 bits)", "codebook decode v4 8 bits"),
            ("codebook, 4,096 vectors of 6 (2 bits)", "codebook decode v6 12 bits"),
            ("codebooks, 256 + 256 vectors of 8 (2 bits)", "codebook decode v8 8+8 bits"),
            ("codebook, 4,096 vectors of 4 (3 bits)", "codebook decode v4 12 bits"),
            *((f"trellis, 2^16 states, {bits} bits", f"trellis multiply K={bits} L=16") for bits in (2, 3, 4)),
        )
    },
)

KERNELS_INTEGERS = Table(
    file=BUILDS,
    at="builds",
    head="build | instructions a weight | ALU | FMA | registers | programs an SM | KiB in flight an SM",
    cells=(*PIPES, "{registers:.0f}", "{programs:.0f}", "{in_flight:K.1f}"),
    rows={f"int{bits}": [{"name": f"decode int{bits} g128 M=8 bf16 sm_90"}] for bits in (2, 3, 4, 8)},
)

KERNELS_CODEBOOKS = Table(
    file=BUILDS,
    at="builds",
    head="build, decode, M <= 8, bf16, sm_90 | instructions a weight | ALU | KiB in flight an SM",
    cells=(*PIPES[:2], "{in_flight:K.1f}"),
    rows={
        build: [{"name": f"codebook decode {build} M=8 bf16 sm_90"}]
        for build in ("v4 8 bits", "v6 12 bits", "v7 11 bits", "v8 8 bits", "v8 8+8 bits", "v8 16 bits")
    },
)

KERNELS_TRELLIS = Table(
    file=BUILDS,
    at="builds",
    head="| instructions | ALU | FMA | registers | spills | programs an SM | KiB in flight an SM",
    cells=(*PIPES, "{registers:.0f}", "{spills:.0f}", "{programs:.0f}", "{in_flight:K.1f}"),
    rows={
        row: [{"name": f"trellis multiply {name} sm_90"}]
        for row, name in (
            ("1 bit", "K=1 L=16 M=8 bf16"),
            ("2 bits", "K=2 L=16 M=8 bf16"),
            ("2 bits, three parts", "K=2 L=16 M=8 bf16 3 parts"),
            ("3 bits", "K=3 L=16 M=8 bf16"),
            ("4 bits", "K=4 L=16 M=8 bf16"),
        )
    },
)

KERNELS_ROTATIONS = Table(
    file=BUILDS,
    at="builds",
    head="features | instructions a number | registers | spills | shared memory, KiB",
    cells=("{instructions_per_weight:.0f}", "{registers:.0f}", "{spills:.0f}", "{shared:K.1f}"),
    rows={f"{features}": [{"name": f"rotate {features} M=1 bf16 sm_90"}] for features in (4096, 5120, 14336)},
)

KERNELS_ATTENTION = Table(
    file=BUILDS,
    at="builds",
    head="heads of 128 channels, instructions a number | 2 bits | 3 bits | 4 bits",
    cells=(INSTRUCTIONS,),
    rows={
        row: [{"name": f"kv attention int{bits}/{bits} D=128{name} sm_90"} for bits in (2, 3, 4)]
        for row, name in (
            ("codes alone", ""),
            ("and a low-rank correction", " rank 4"),
            ("and outliers of keys", " rank 4 sparse"),
        )
    },
)

TABLES: dict[str, Table | Printed] = {
    "integers": INTEGERS,
    "head-bits": HEAD_BITS,
    "target-shift": TARGET_SHIFT,
    "methods": METHODS,
    "methods-time": METHODS_TIME,
    "trellis-parts": TRELLIS_PARTS,
    "trellis-shift": TRELLIS_SHIFT,
    "trellis-codes": TRELLIS_CODES,
    "vectors": VECTORS,
    "rate-distortion": RATE_DISTORTION,
    "activations": ACTIVATIONS,
    "cpu-products": CPU_PRODUCTS,
    "cpu-models": CPU_MODELS,
    "kv-cache": KV_CACHE,
    "search": SEARCH,
    "tuned": TUNED,
    "tuned-vptq": TUNED_VPTQ,
    "auto-round": AUTO_ROUND,
    "low-rank": LOW_RANK,
    "lrec": LREC,
    "kernels": KERNELS,
    "kernels-integers": KERNELS_INTEGERS,
    "kernels-codebooks": KERNELS_CODEBOOKS,
    "kernels-trellis": KERNELS_TRELLIS,
    "kernels-rotations": KERNELS_ROTATIONS,
    "kernels-attention": KERNELS_ATTENTION,
    "damage": DAMAGE,
    "faults": FAULTS,
    "dry-run": DRY_RUN,
    "shared": SHARED,
    "giants": GIANTS,
    "memory": MEMORY,
    "experts-memory": EXPERTS_MEMORY,
    "stored-memory": STORED_MEMORY,
    "finetune-memory": FINETUNE_MEMORY,
    "kv-memory": KV_MEMORY,
    "checksums": CHECKSUMS,
    "real-model": REAL_MODEL,
    "reference-rows": REFERENCE_ROWS,
    "predictions": PREDICTIONS,
    "settings": SETTINGS,
    "experts": EXPERTS,
    "shrinkage": SHRINKAGE,
    "architectures": ARCHITECTURES,
    "versions": VERSIONS,
    "vllm": VLLM,
    "vllm-real": VLLM_REAL,
    "grids": GRIDS,
    "exchange": EXCHANGE,
    "exchange-real": EXCHANGE_REAL,
    "search-real": SEARCH_REAL,
    "drafts": DRAFTS,
    "forms": FORMS,
}
"""Tables by the name in a document's mark."""
