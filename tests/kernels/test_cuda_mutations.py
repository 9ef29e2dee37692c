"""Every injected bug must be seen to fail: a harness that never fails proves nothing.

Each bug is an edit of the kernels' source; ``found_by`` names the build that must notice, at the cases that the
sound kernels pass (test_cuda_sanitizers.py).
"""

from __future__ import annotations

from typing import NamedTuple

import cuda_support as support
import pytest

pytestmark = pytest.mark.slow  # a compiled harness for each bug


class Bug(NamedTuple):
    name: str
    half: str
    file: str
    old: str
    new: str
    found_by: str = "plain"
    case: str = "all"


BUGS = [
    Bug(
        "scan reads a stage before it is there",
        "TOPK",
        "topk_scan.cuh",
        "        __syncthreads();  // this stage is there for all; the one that is loaded next has been read by all\n",
        "",
    ),
    Bug("scan does not wait for its copies", "TOPK", "topk_scan.cuh", "        cp_async_wait<kStages - 2>();\n", ""),
    Bug("fragments swapped", "TOPK", "topk_scan.cuh", ".mma(a[i], b[0], b[1]);", ".mma(a[i], b[1], b[0]);"),
    Bug(
        "gallery read past its end",
        "TOPK",
        "topk_scan.cuh",
        "            const bool real = row0 + r < args.n;\n",
        "            const bool real = true;\n",
        "asan",
    ),
    Bug(
        "a tile's fragment one row down",
        "TOPK",
        "topk_scan.cuh",
        "* 8 + lane % 8 + lane / 16 * 8) * kChunkPitch + k",
        "* 8 + lane % 8 + lane / 16 * 8 + 1) * kChunkPitch + k",
        "asan",
    ),
    Bug(
        "rows past the end are candidates",
        "TOPK",
        "topk_scan.cuh",
        "if (row < static_cast<uint32_t>(args.n)) {",
        "{",
        "asan",
    ),
    Bug(
        "the bound forgets what rounding lost",
        "TOPK",
        "topk_scan.cuh",
        "                            u += fmaf(query_norm[i], meta.z, query_residual[i] * meta.w);\n",
        "",
        case="near",
    ),
    Bug(
        "every query counts as certified",
        "TOPK",
        "topk_exact.cuh",
        "    const bool certified = bound == -INFINITY ||",
        "    const bool certified = true ||",
        case="near",
    ),
    Bug(
        "select forgets what it dropped itself",
        "TOPK",
        "topk_exact.cuh",
        "if (args.keep < size && keys[args.keep] != kNoKey)",
        "if (false)",
        case="near-select",
    ),
    Bug(
        "the merge's dropped keys are not bounded",
        "TOPK",
        "topk_scan.cuh",
        "return lane < 2 || first == kNoKey ? -INFINITY : key_score(first);",
        "return -INFINITY;",
        case="near-merge",
    ),
    Bug(
        "a bound of half of the quad",
        "TOPK",
        "topk_scan.cuh",
        "        bound = fmaxf(bound, __shfl_xor_sync(0xffffffffu, bound, 2));\n",
        "",
        case="near-merge",
    ),
    Bug(
        "a thread's dropped rows are not bounded",
        "TOPK",
        "topk_scan.cuh",
        "if (lists[i].row[kKeep - 1] != 0xffffffffu) bound =",
        "if (false) bound =",
        case="near-lane",
    ),
    Bug(
        "merged with the wrong partner",
        "TOPK",
        "topk_scan.cuh",
        "keep_half(keys, 3, lane < 2);",
        "keep_half(keys, 2, lane < 2);",
        case="near-merged",
    ),
    Bug("merged without sorting", "TOPK", "topk_scan.cuh", "    sort_bitonic(keys); ", "    ", case="near-merged"),
    Bug(
        "the merge keeps the worst",
        "TOPK",
        "topk_scan.cuh",
        "keep_half(keys, 3, lane < 2);",
        "keep_half(keys, 3, lane >= 2);",
        case="near-merged",
    ),
    Bug(
        "the second lane's keys are not written",
        "TOPK",
        "topk_scan.cuh",
        "if (row < args.n_queries && lane % 4 < 2) {",
        "if (row < args.n_queries && lane % 4 < 1) {",
        case="near-merged",
    ),
    Bug(
        "both lanes' keys in one place",
        "TOPK",
        "topk_scan.cuh",
        "list * Shape::kListKeys + lane % 4 * kKeep;",
        "list * Shape::kListKeys;",
        case="near-merged",
    ),
    Bug("ties by the higher row", "TOPK", "topk_keys.cuh", "<< 32 | row;", "<< 32 | (0xfffffffeu - row);", "asan"),
    Bug(
        "failed queries counted without an atomic",
        "TOPK",
        "topk_exact.cuh",
        "args.failed_query[atomicAdd(args.failed, 1u)] =",
        "args.failed_query[args.failed[0]++] =",
        "tsan",
        "equal-pair",
    ),
    Bug(
        "sort without its barrier",
        "TOPK",
        "topk_keys.cuh",
        "        for (int step = run / 2; step > 0; step /= 2) {\n            __syncthreads();\n",
        "        for (int step = run / 2; step > 0; step /= 2) {\n",
    ),
    Bug(
        "shuffle in a divergent warp",
        "TOPK",
        "topk_exact.cuh",
        "if (i >= count) return;",
        "if (i >= count || threadIdx.x % 32 > 29) return;",
    ),
    Bug(
        "layers not kept apart",
        "TRANSFORM",
        "transform.cuh",
        "            unit0 += units;\n        }\n        grid_barrier(args.barrier);\n",
        "            unit0 += units;\n        }\n",
    ),
    Bug(
        "the grid barrier forgets its fence",
        "TRANSFORM",
        "transform.cuh",
        "GPU_INLINE void grid_barrier(unsigned* state) {\n    __threadfence();\n",
        "GPU_INLINE void grid_barrier(unsigned* state) {\n",
        "tsan",
        "small",
    ),
    Bug(
        "partial sums read too early",
        "TRANSFORM",
        "transform.cuh",
        "acc[j][e];\n        }\n    __syncthreads();\n",
        "acc[j][e];\n        }\n",
    ),
    Bug(
        "the rows' low parts forgotten",
        "TRANSFORM",
        "transform.cuh",
        "dst[part + j] = float_to_bf16(x - bf16_to_float(high));",
        "dst[part + j] = bf16{0};",
    ),
    Bug("the length forgotten", "TRANSFORM", "transform.cuh", "src[j] / divisor * factor", "src[j] / divisor"),
    Bug("rows that stay as they come normalised", "TRANSFORM", "transform.cuh", "if (length > 0.0f) {", "{"),
    Bug(
        "the last layer's depth cut at the activations",
        "TRANSFORM",
        "transform.cuh",
        "const int chunks = layer.pitch / kLayerChunk;",
        "const int chunks = layer.pitch / kLayerChunk - (layer.y_last && layer.pitch > kLayerChunk);",
    ),
    Bug(
        "the output's rows at the columns' distance",
        "TRANSFORM",
        "transform.cuh",
        "layer.y_last[row * layer.y_pitch + column] = sum;",
        "layer.y_last[row * layer.d_out + column] = sum;",
    ),
    Bug(
        "side rows over the old ones",
        "TRANSFORM",
        "transform.cuh",
        "convert_row(args.side_rows, row, args.side_bf16 + row * args.side_pitch, args.split);",
        "convert_row(args.side_rows, row, args.old_bf16 + row * args.side_pitch, args.split);",
    ),
    Bug(
        "side rows converted where there are none",
        "TRANSFORM",
        "transform.cuh",
        "i < (args.side_bf16 ? 2 : 1) * rows;",
        "i < 2 * rows;",
    ),
    Bug("no ReLU", "TRANSFORM", "transform.cuh", "if (layer.relu) sum", "if (false) sum"),
    Bug(
        "weights read past their rows",
        "TRANSFORM",
        "transform.cuh",
        "const bool real = column0 + r < layer.d_out;",
        "const bool real = true;",
        "asan",
    ),
]  # fmt: skip


@support.needs_cxx
@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: bug.name.replace(" ", "-"))
def test_injected_bug_is_found(bug: Bug) -> None:
    program = support.driver(bug.half, bug.found_by, {bug.file: [(bug.old, bug.new)]})
    said = ""
    for schedule in (1, 2, 3):
        done = support.drive(program, bug.case, schedule)
        if done.returncode:
            return
        said += done.stdout
    pytest.fail("every schedule passed:\n" + said)


@support.needs_cxx
@pytest.mark.parametrize(
    "case", ["near", "near-lane", "near-merge", "near-select", "near-merged", "equal-pair", "equal", "small"]
)
def test_the_cases_pass_without_a_bug(case: str) -> None:
    done = support.drive(support.driver("TOPK"), case, 1)
    assert done.returncode == 0, done.stdout
