"""VPTQ's invariants, and a test for each fault of the published implementation."""

import dataclasses

import pytest
import torch

from quantkit.core.metrics import proxy_loss
from quantkit.core.stats import LayerStats
from quantkit.quantizers import kmeans
from quantkit.quantizers.feedback import error_feedback
from quantkit.quantizers.vptq import VPTQ, VectorCode, _predicted_error

from ..helpers.methods import problem


def loss(quantizer, weight, hessian):
    packed = quantizer.quantize(weight, LayerStats(hessian))
    return proxy_loss(weight - packed.dequantize(torch.float64), hessian)


def test_one_column_is_pure_vector_quantization():
    weight = torch.randn(512, 1, dtype=torch.float64)
    quantizer = VPTQ(2.0, vector_length=2, passes=1, refit=0)
    packed = quantizer.quantize(weight, LayerStats(torch.ones(1, 1)))
    vectors = weight.view(-1, 2)
    book = kmeans.fit(vectors, torch.ones(256, dtype=torch.float64), 4).half().double()
    assert torch.equal(packed.dequantize(torch.float64), book[kmeans.assign(vectors, book)[0]].view(512, 1))


def test_scalars_are_gptq_with_the_same_levels():
    """v = 1 and 2^b centroids: the feedback loop over a table of 2^b levels."""
    weight, hessian = problem(out_features=32, in_features=48)
    packed = VPTQ(3.0, vector_length=1, passes=1, refit=0).quantize(weight, LayerStats(hessian))
    levels = packed.books[0, :, 0].double()

    class Table:
        width = 1

        def __init__(self):
            self.columns = {}

        def group_size(self):
            return 10**9

        def open(self, start, columns):
            pass

        def round(self, index, column):
            self.columns[index] = levels[(column[:, None] - levels).abs().argmin(1)]
            return self.columns[index]

    table, stats = Table(), LayerStats(hessian)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    error_feedback(weight[:, order], stats.inverse_factor(0.01, order), table)
    expected = torch.stack([table.columns[i] for i in order.argsort().tolist()], dim=1)
    assert torch.equal(packed.dequantize(torch.float64), expected)


def test_feedback_beats_the_codebook_alone():
    weight, hessian = problem(out_features=96, in_features=64)
    quantizer = VPTQ(2.0, vector_length=3, passes=1, refit=0)
    alone = quantizer.quantize(weight, LayerStats(torch.diag(hessian.diagonal())))  # the same k-means, no feedback
    assert loss(quantizer, weight, hessian) < 0.8 * proxy_loss(weight - alone.dequantize(torch.float64), hessian)


def test_second_pass_residual_and_refit_lower_the_loss():
    weight, hessian = problem(out_features=96, in_features=96)
    once = loss(VPTQ(2.0, vector_length=3, passes=1, refit=0), weight, hessian)
    assert loss(VPTQ(2.0, vector_length=3, passes=2, refit=0), weight, hessian) < once
    assert loss(VPTQ(2.0, vector_length=3, passes=1), weight, hessian) < once
    main = loss(VPTQ(1.0, vector_length=4, refit=0), weight, hessian)
    assert loss(VPTQ(2.0, vector_length=4, residual_bits=4, refit=0), weight, hessian) < 0.5 * main


def test_columns_may_come_in_any_order():
    """Permuting the inputs and undoing it at the end changes nothing: codes belong to columns, not to places."""
    weight, hessian = problem(out_features=24, in_features=40)
    there = torch.randperm(40)
    straight = VPTQ(2.0, 3).quantize(weight, LayerStats(hessian)).dequantize()
    permuted = VPTQ(2.0, 3).quantize(weight[:, there], LayerStats(hessian[there][:, there])).dequantize()
    torch.testing.assert_close(permuted, straight[:, there], rtol=2e-3, atol=2e-3)


def test_scales_change_nothing_where_columns_are_alike():
    weight, hessian = problem(out_features=64, in_features=48)
    weight = weight / weight.square().mean(0).sqrt()
    plain = VPTQ(2.0, 2, refit=0, passes=1).quantize(weight, LayerStats(hessian))
    scaled = VPTQ(2.0, 2, refit=0, passes=1, scale_inputs=True).quantize(weight, LayerStats(hessian))
    assert float((plain.codes == scaled.codes).double().mean()) > 0.98


def test_scales_enter_the_feedback():
    """Pitfall 8a: with columns of unlike size the loss is that of S H S; the plain H loses to no scales at all."""
    weight, hessian = problem(out_features=96, in_features=64)
    sizes = torch.logspace(-1.5, 1.5, 64, dtype=torch.float64)[torch.randperm(64)]
    weight = weight * sizes
    hessian = hessian / sizes / sizes[:, None]  # as layers are: what is large meets small inputs
    scaled = VPTQ(2.0, 2, refit=0, scale_inputs=True)
    right = loss(scaled, weight, hessian)
    assert right < 0.5 * loss(VPTQ(2.0, 2, refit=0), weight, hessian)
    scales = weight.square().mean(0).sqrt()
    wrong = VPTQ(2.0, 2, refit=0).quantize(weight / scales, LayerStats(hessian)).dequantize(torch.float64) * scales
    assert right < 0.8 * proxy_loss(weight - wrong, hessian)


def test_the_factor_is_of_the_permuted_hessian():
    """Pitfall 8b: permuting a triangular factor instead of H loses most of the feedback."""
    weight, hessian = problem(out_features=96, in_features=64)
    order = hessian.diagonal().argsort(descending=True, stable=True)

    class Permuted(LayerStats):
        def inverse_factor(self, damp, order=None):
            factor = LayerStats.inverse_factor(self, damp)
            return factor if order is None else factor[order][:, order].triu()

    right = loss(VPTQ(2.0, 3, refit=0), weight, hessian)
    wrong = VPTQ(2.0, 3, refit=0).quantize(weight, Permuted(hessian))
    assert not torch.equal(order, torch.arange(64))
    assert right < 0.95 * proxy_loss(weight - wrong.dequantize(torch.float64), hessian)


def test_runs_are_reproducible_whatever_the_global_seed():
    """Pitfall 8c: a start at random and a single try gave unlike results from run to run."""
    weight, hessian = problem(out_features=48, in_features=64)
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        states.append(VPTQ(2.0, 4, residual_bits=3).quantize(weight, LayerStats(hessian)).state())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_every_setting_has_an_effect():
    """Pitfall 9: settings that were read from the command line and never arrived."""
    weight, hessian = problem(out_features=48, in_features=64)
    plain = VPTQ(2.0, 2).quantize(weight, LayerStats(hessian)).dequantize()
    changed = [{"damp": 0.5}, {"residual_bits": 1}, {"outliers": 0.2}, {"ranges": 2, "vector_length": 1}, {"refit": 0}]
    for settings in [*changed, {"scale_inputs": True}, {"passes": 1}, {"bits": 3.0}, {"vector_length": 3}]:
        base = {"bits": 2.0, "vector_length": 2}
        inputs = 384 if "ranges" in settings else 64
        other_weight, other_hessian = problem(out_features=48, in_features=inputs)
        other = VPTQ(**base | settings).quantize(other_weight, LayerStats(other_hessian)).dequantize()
        same = plain if inputs == 64 else VPTQ(2.0, 1).quantize(other_weight, LayerStats(other_hessian)).dequantize()
        assert not torch.equal(other, same), settings
    assert torch.equal(VPTQ(2.0, 2, block_size=7).quantize(weight, LayerStats(hessian)).dequantize(), plain)


def test_damping_is_applied_once():
    """Pitfall 9: damped when H is made and again when it is inverted."""
    weight, hessian = problem(out_features=16, in_features=32)
    asked = []

    class Watched(LayerStats):
        def inverse_factor(self, damp, order=None):
            asked.append(damp)
            return LayerStats.inverse_factor(self, damp, order)

    VPTQ(2.0, 2, damp=0.03).quantize(weight, Watched(hessian))
    assert asked == [0.03]


def test_dead_inputs_are_found_before_damping():
    """Pitfall 9: the test for dead columns ran after damping and never fired."""
    weight, hessian = problem(out_features=32, in_features=64)
    hessian[5] = hessian[:, 5] = 0
    weight[:, 5] = 100.0
    packed = VPTQ(2.0, 2).quantize(weight, LayerStats(hessian))
    assert torch.isfinite(packed.dequantize()).all()
    assert float(packed.books.abs().max()) < 20, "a dead input's weights must not draw centroids"


def test_residual_vectors_are_weighted_one_by_one():
    """Pitfall 9: weights of shape [vectors, v] instead of [vectors]: the residual book is for what matters."""
    weight, hessian = problem(out_features=64, in_features=32)
    hessian = torch.diag(torch.cat([torch.full((4,), 1e6), torch.ones(28)])).double()
    packed = VPTQ(3.0, 2, residual_bits=3, refit=0).quantize(weight, LayerStats(hessian))
    error = (weight - packed.dequantize(torch.float64)).square().mean(0)
    assert error[:4].mean() < 0.8 * error[4:].mean()


def test_books_keep_to_their_share_of_the_bits():
    """Pitfall 10: v = 6 with 4,096 centroids would cost a 512 x 512 layer 1.5 bits a weight."""
    assert 16 * 6 * 4096 / 512**2 == 1.5
    quantizer = VPTQ(2.0)
    for shape in ((128, 256), (256, 256), (512, 512), (4096, 4096), (28672, 8192)):
        code = quantizer.code(*shape)
        assert code.codebook_bits <= 0.05 * 2 * shape[0] * shape[1]
        assert sum(code.bits) == 2 * code.length
    assert quantizer.code(4096, 4096) == VectorCode(6, (12,))
    assert quantizer.code(256, 256) == VectorCode(3, (6,))
    assert VPTQ(2.0, vector_length=6).code(256, 256) == VectorCode(6, (12,)), "what the user fixes stays"
    assert VPTQ(2.0, vector_length=6).code(64, 64) == VPTQ(2.0).code(64, 64), "but for books dearer than the weights"


def test_held_out_weights_are_coded_as_well_as_those_of_the_fit():
    """Pitfall 10: few vectors a centroid overfit; the share keeps at least some dozens for each."""
    for shape in ((256, 256), (768, 256)):
        code = VPTQ(2.0).code(*shape)
        assert shape[0] * shape[1] / code.length / (1 << code.bits[0]) > 80


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"residual_bits": 4, "vector_length": 4},
        {"outliers": 0.1},
        {"ranges": 2},
        {"scale_inputs": True},
        {"bits": 2.5},
    ],
)
def test_bits_formula_equals_the_bytes_on_disk(settings):
    """log2(k) / v for each stage, 16 v k a book, 16 a scale and a place in the order."""
    quantizer, (rows, columns) = VPTQ(**settings), (96, 384)
    weight, hessian = problem(out_features=rows, in_features=columns)
    packed = quantizer.quantize(weight, LayerStats(hessian))
    code, outliers = quantizer.code(rows, columns - round(quantizer.outliers * columns)), 0
    vectors = -(-rows // code.length)
    plain = columns - round(quantizer.outliers * columns)
    bits = sum(code.bits) * vectors * plain + quantizer.ranges * code.codebook_bits
    if quantizer.outliers:
        outliers = packed.outliers.nbytes * 8
    order = 16 * columns * (packed.order is not None)
    total = bits + outliers + order + 16 * columns * quantizer.scale_inputs
    assert packed.nbytes * 8 == pytest.approx(total, rel=0.04), "but for the last words of a row"
    assert packed.nbytes * 8 >= total


def test_outliers_take_the_columns_that_matter():
    weight, hessian = problem(out_features=64, in_features=64)
    hessian = hessian * torch.where(torch.arange(64) == 17, 1e3, 1.0) ** 0.5
    hessian = hessian * torch.where(torch.arange(64) == 17, 1e3, 1.0)[:, None] ** 0.5
    packed = VPTQ(2.0, 2, outliers=1 / 64).quantize(weight, LayerStats(hessian))
    assert packed.outliers is not None
    assert packed.order[0] == 17
    error = (weight - packed.dequantize(torch.float64)).square().mean(0)
    assert error[17] < 0.2 * error.mean()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0.2}, "0.5 to 8"),
        ({"vector_length": 40}, "1 to 16"),
        ({"vector_length": 12, "bits": 2.0}, "must be 1 to 16"),
        ({"residual_bits": 20}, "at most 16"),
        ({"outliers": 1.0}, "a fraction"),
        ({"ranges": 0}, "at least 1"),
        ({"outlier_bits": 30}, "0.5 to 8"),
    ],
)
def test_senseless_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        VPTQ(**settings)


def test_damaged_weights_are_refused():
    weight, hessian = problem(out_features=48, in_features=64)
    packed = VPTQ(2.0, 2, outliers=0.1).quantize(weight, LayerStats(hessian))
    packed.validate()
    for changes, message in (
        ({"order": packed.order.clone().fill_(3)}, "no permutation"),
        ({"books": packed.books[:, :-1]}, r"books is float16 \[1, 15, 2\]; codebook takes float16 \[1, 16, 2\]"),
        ({"books": packed.books * float("inf")}, "NaN or Inf"),
        ({"codes": packed.codes[:-1]}, "codes is"),
        ({"out_features": 50}, r"outliers is \[48, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(packed, **changes).validate()


def test_outliers_with_the_code_of_the_rest_are_still_apart():
    """Outliers are told by their number, not by their code, which may be the others' own."""
    weight, hessian = problem(out_features=64, in_features=256)
    for quantizer in (VPTQ(4, outliers=0.1), VPTQ(2, outliers=0.4, outlier_bits=2)):
        packed = quantizer.quantize(weight, LayerStats(hessian))
        assert packed.outliers is not None
        assert len(packed.books) == 1
        assert loss(quantizer, weight, hessian) < 1.1 * loss(
            dataclasses.replace(quantizer, outliers=0), weight, hessian
        )


def test_more_bits_never_choose_a_worse_code():
    for shape in ((256, 256), (768, 256), (4096, 4096), (11008, 4096)):
        errors = [_predicted_error(VPTQ(bits / 8).code(*shape)) for bits in range(8, 65)]
        assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 4, "outliers": 0.1, "outlier_bits": 2}, "outliers get at least"),
        ({"vector_length": 4.0}, "vectors hold 1 to 16"),
        ({"residual_bits": 16}, "must be 1 to 12 bits a code"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        VPTQ(**settings)
