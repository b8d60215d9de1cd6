"""What the distributed test of the contrastive losses runs on every rank; new processes can import it from here."""

import torch
from torch import Tensor

from med3dvlm.configuration import CLIPConfig
from med3dvlm.model.clip import CLIPModel
from med3dvlm.model.losses import info_nce_loss, siglip_loss
from tests.helpers.golden import fill_by_rule, load_golden, rule_uniform, rule_volume

LOSSES = {"sigmoid": siglip_loss, "nce": info_nce_loss}
SCALARS = {"sigmoid": {"t_prime": 1.2, "bias": -3.0}, "nce": {"logit_scale": 1.5}}


def feature_gradients(loss_type: str, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Loss of the given rows of 6 fixed pairs, and its gradients; rows that are not given get a zero gradient."""
    raw = torch.from_numpy(rule_uniform("contrastive|features", (2, 6, 8))) - 0.5
    features = torch.nn.functional.normalize(raw.float(), dim=-1).requires_grad_()  # [2, 6, 8]
    scalars = [torch.tensor(value, requires_grad=True) for value in SCALARS[loss_type].values()]
    loss = LOSSES[loss_type](features[0, rows], features[1, rows], *scalars)
    loss.backward()
    gradients = {name: scalar.grad for name, scalar in zip(SCALARS[loss_type], scalars, strict=True)}
    return {"loss": loss.detach(), "features": features.grad, **gradients}


def model_gradients(loss_type: str, rows: slice = slice(None)) -> dict[str, Tensor]:
    """Loss of the given rows of the 6 recorded pairs (small dual encoder, eval mode), and its parameter gradients."""
    record, tensors = load_golden("clip/clip-dist")
    model = recorded_clip_model(record, loss_type)
    images = rule_volume(record["image_rule_tag"], record["image_shape"])
    output = model(images[rows], tensors["input_ids"][rows], tensors["attention_mask"][rows])
    output.loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    return {"loss": output.loss.detach(), **gradients}


def recorded_clip_model(record: dict, loss_type: str = "sigmoid") -> CLIPModel:
    """The dual encoder of a golden record, in eval mode, filled by the rule."""
    config = CLIPConfig(
        input_size=record.get("constructor_input_size", (256, 256, 128)),
        hidden_size=record["hidden_size"],
        loss_type=loss_type,
        text_config={"model_type": "distilbert", **record["text_encoder"]},
    )
    return fill_by_rule(CLIPModel(config), record["salt"]).eval()


def all_gradients(rank: int = 0, world_size: int = 1) -> dict[str, dict[str, Tensor]]:
    """Both kinds of gradients of both losses for this rank's share of the pairs."""
    share = 6 // world_size
    rows = slice(rank * share, (rank + 1) * share)
    results = {f"features {name}": feature_gradients(name, rows) for name in LOSSES}
    return results | {f"model {name}": model_gradients(name, rows) for name in LOSSES}
