import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.losses import DiceLoss as MonaiDiceLoss
from torch.nn import functional as F

from mitoseg_lib.losses import DiceBCELoss, DiceLoss

FORMS = pytest.mark.parametrize("squared", [False, True], ids=["plain", "squared"])
LOSSES = pytest.mark.parametrize("loss_class", [DiceLoss, DiceBCELoss])
SURE = 200.0  # a logit whose sigmoid is exactly 1 in float32; and 0 with the other sign


def random_batch(seed=0, shape=(3, 1, 8, 9), share=0.3):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(shape, generator=generator)
    return logits, torch.rand(shape, generator=generator) < share


def logits_of(mask):
    return torch.where(mask, SURE, -SURE)


# --- known answers


@FORMS
def test_dice_by_hand(squared):
    logits = torch.logit(torch.tensor([[0.5, 0.25, 0.75, 0.0]]))
    targets = torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    total = 0.25 + 0.0625 + 0.5625 + 2 if squared else 1.5 + 2
    expected = 1 - (2 * 1.25 + 1) / (total + 1)
    assert DiceLoss(squared=squared, smooth=1)(logits, targets).item() == pytest.approx(expected, abs=1e-6)


@FORMS
def test_binary_masks_give_one_minus_the_dice_coefficient(squared):
    truth = torch.zeros(1, 1, 10, 10, dtype=torch.bool)
    truth[..., 2:6, 2:6] = True
    shifted = truth.roll(2, dims=-1)  # half of the 16 pixels overlap
    loss = DiceLoss(squared=squared, smooth=0)(logits_of(shifted), truth)
    assert loss.item() == pytest.approx(0.5)


@FORMS
@LOSSES
def test_a_perfect_prediction_has_loss_0(loss_class, squared):
    truth = random_batch()[1]
    assert loss_class(squared=squared)(logits_of(truth), truth).item() == 0


@FORMS
@LOSSES
@pytest.mark.parametrize("value", [False, True], ids=["empty", "all foreground"])
def test_masks_of_one_class_against_themselves_have_loss_0(loss_class, squared, value):
    truth = torch.full((2, 1, 5, 5), value)
    assert loss_class(squared=squared)(logits_of(truth), truth).item() == 0


@FORMS
def test_a_prediction_without_overlap_has_nearly_loss_1(squared):
    truth = random_batch()[1]
    loss = DiceLoss(squared=squared)(logits_of(~truth), truth)
    assert loss.item() == pytest.approx(1 - 1 / (truth.numel() + 1))


@FORMS
def test_the_empty_mask_of_a_full_truth_and_the_other_way_round(squared):
    full, empty = torch.ones(1, 1, 4, 4, dtype=torch.bool), torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    for prediction, truth in [(full, empty), (empty, full)]:
        assert DiceLoss(squared=squared)(logits_of(prediction), truth).item() == pytest.approx(1 - 1 / 17)


def test_the_squared_form_differs_for_probabilities_in_value_and_gradient():
    truth = random_batch()[1]
    results = []
    for squared in (False, True):
        logits = random_batch()[0].requires_grad_()
        loss = DiceLoss(squared=squared)(logits, truth)
        loss.backward()
        results.append((loss.detach(), logits.grad))
    assert abs(results[0][0] - results[1][0]) > 0.01
    assert (results[0][1] - results[1][1]).abs().max() > 1e-4


def test_the_batch_is_pooled_unless_samples_are_asked_for():
    truth = torch.zeros(2, 1, 10, 10, dtype=torch.bool)
    truth[0, :, :5] = True  # the second sample is empty, and one pixel is found in it
    prediction = truth.clone()
    prediction[1, 0, 0, 0] = True
    pooled = DiceLoss()(logits_of(prediction), truth).item()
    assert pooled == pytest.approx(1 - 101 / 102, abs=1e-6)
    per_sample = DiceLoss(per_sample=True)(logits_of(prediction), truth).item()
    assert per_sample == pytest.approx((0 + 1 - 1 / 2) / 2, abs=1e-6)


def test_dice_bce_is_the_sum():
    logits, truth = random_batch()
    bce = F.binary_cross_entropy_with_logits(logits, truth.float())
    assert DiceBCELoss()(logits, truth) == DiceLoss()(logits, truth) + bce


def test_the_settings_reach_the_dice_of_the_sum():
    logits, truth = random_batch()
    settings_ = {"squared": True, "smooth": 0.5, "per_sample": True}
    difference = DiceBCELoss(**settings_)(logits, truth) - DiceBCELoss()(logits, truth)
    expected = DiceLoss(**settings_)(logits, truth) - DiceLoss()(logits, truth)
    assert difference.item() == pytest.approx(expected.item(), abs=1e-6)
    assert abs(expected) > 0.01


def test_printing_shows_the_settings():
    assert repr(DiceLoss(squared=True)) == "DiceLoss(squared=True, smooth=1.0, per_sample=False)"


# --- other implementations


@FORMS
@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("smooth", [1e-5, 1.0])
@pytest.mark.parametrize("shape", [(3, 1, 8, 9), (2, 1, 4, 5, 6)])
def test_dice_agrees_with_monai(squared, per_sample, smooth, shape):
    logits, truth = random_batch(shape=shape)
    truth[0] = False
    theirs = MonaiDiceLoss(sigmoid=True, squared_pred=squared, batch=not per_sample, smooth_nr=smooth, smooth_dr=smooth)
    ours = DiceLoss(squared=squared, smooth=smooth, per_sample=per_sample)
    torch.testing.assert_close(ours(logits, truth), theirs(logits, truth.float()))


def test_the_gradient_agrees_with_monai():
    logits, truth = random_batch()
    gradients = []
    for loss in (DiceLoss(), MonaiDiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)):
        leaf = logits.clone().requires_grad_()
        loss(leaf, truth.float()).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


# --- gradients and numbers


@FORMS
@LOSSES
@pytest.mark.parametrize("per_sample", [False, True])
def test_gradcheck(loss_class, squared, per_sample):
    logits, truth = random_batch(shape=(2, 1, 3, 3))
    logits = logits.double().requires_grad_()
    loss = loss_class(squared=squared, per_sample=per_sample)
    assert torch.autograd.gradcheck(loss, (logits, truth))


@FORMS
@LOSSES
def test_huge_logits_keep_loss_and_gradient_finite(loss_class, squared):
    truth = random_batch()[1]
    for sign in (1, -1):
        logits = (sign * 1e4 * torch.where(truth, 1.0, -1.0)).requires_grad_()
        loss = loss_class(squared=squared)(logits, truth)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(logits.grad).all()


@FORMS
@LOSSES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(loss_class, squared, dtype):
    # 2 x 512 x 512 sums to more than float16 holds, and to more digits than bfloat16 has.
    logits, truth = random_batch(shape=(2, 1, 512, 512))
    logits = logits.to(dtype)
    loss = loss_class(squared=squared)
    expected = loss(logits.float(), truth)
    assert loss(logits, truth).dtype == torch.float32
    assert loss(logits, truth) == expected
    with torch.autocast("cpu", dtype=dtype):
        assert loss(logits, truth) == expected


@LOSSES
def test_targets_of_every_kind_give_one_answer(loss_class):
    logits, truth = random_batch()
    expected = loss_class()(logits, truth)
    for dtype in (torch.uint8, torch.int64, torch.float16, torch.float32, torch.float64):
        assert loss_class()(logits, truth.to(dtype)) == expected


@LOSSES
def test_any_shape_will_do(loss_class):
    logits, truth = random_batch(shape=(24,))
    expected = loss_class()(logits, truth)
    for shape in [(4, 6), (2, 1, 3, 4), (1, 1, 2, 3, 4)]:
        torch.testing.assert_close(loss_class()(logits.view(shape), truth.view(shape)), expected)
    assert loss_class()(logits[0], truth[0]).ndim == 0


@LOSSES
def test_a_loss_can_be_trained_on(loss_class):
    truth = random_batch()[1]
    logits = torch.zeros(truth.shape, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        loss = loss_class()(logits, truth)
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert ((logits > 0) == truth).all()


# --- what holds for any input

masks = st.lists(st.booleans(), min_size=1, max_size=30)
values = st.floats(-50, 50, width=32)


@given(data=st.data(), squared=st.booleans(), truth=masks)
@settings(deadline=None)
def test_dice_loss_lies_between_0_and_1(data, squared, truth):
    logits = torch.tensor(data.draw(st.lists(values, min_size=len(truth), max_size=len(truth))))
    loss = DiceLoss(squared=squared)(logits, torch.tensor(truth)).item()
    assert -1e-6 <= loss <= 1


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
@settings(deadline=None)
def test_for_binary_masks_dice_is_symmetric_and_both_forms_are_equal(pairs):
    a, b = torch.tensor(pairs).T
    plain = DiceLoss()(logits_of(a), b)
    assert plain == DiceLoss()(logits_of(b), a)
    assert plain == DiceLoss(squared=True)(logits_of(a), b)


@given(truth=masks, order=st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_order_of_voxels_does_not_matter(truth, order):
    index = list(range(len(truth)))
    order.shuffle(index)
    logits, mask = torch.linspace(-2, 2, len(truth)), torch.tensor(truth)
    torch.testing.assert_close(DiceBCELoss()(logits[index], mask[index]), DiceBCELoss()(logits, mask))


# --- errors


@LOSSES
def test_shapes_that_differ(loss_class):
    with pytest.raises(ValueError, match=r"shape \(2, 1, 4, 4\) and the targets \(2, 4, 4\).*targets\[:, None\]"):
        loss_class()(torch.zeros(2, 1, 4, 4), torch.zeros(2, 4, 4))


@LOSSES
@pytest.mark.parametrize("bad", [255.0, -1.0, float("nan"), float("inf")])
def test_targets_that_are_no_mask(loss_class, bad):
    targets = torch.zeros(1, 1, 4, 4)
    targets[0, 0, 1, 1] = bad
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]; a mask of 0 and 255"):
        loss_class()(torch.zeros(1, 1, 4, 4), targets)


@LOSSES
def test_nothing_to_compare(loss_class):
    with pytest.raises(ValueError, match="no voxel"):
        loss_class()(torch.zeros(0, 1, 4, 4), torch.zeros(0, 1, 4, 4))


@LOSSES
def test_logits_that_are_a_mask(loss_class):
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match="must be floating"):
        loss_class()(mask, mask)


@LOSSES
@pytest.mark.parametrize("smooth", [-1.0, float("nan")])
def test_a_negative_smooth(loss_class, smooth):
    with pytest.raises(ValueError, match="must be 0 or more"):
        loss_class(smooth=smooth)
