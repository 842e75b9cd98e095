"""Robust training on large images.

What lives here: settings, with their source. What does not: recipes for small images (`recipes.py`, which lists this
one beside its own) and any mechanism.
"""

from typing import Any

from jaxadv import attacks
from jaxadv.train import augment, objectives, schedules
from jaxadv.train.assembly import assemble, judge, linf, network, passes, torch_sgd

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def pgd_imagenet(
    data,
    *,
    seed: int = 0,
    eps=None,
    epochs: float = 90,
    lr: float = 0.1,
    net="resnet50",
    width: int = 64,
    depths: tuple[int, ...] = (3, 4, 6, 3),
    validation=None,
    **overrides,
) -> dict[str, Any]:
    """Adversarial training on ImageNet with few steps of PGD, whose networks are the usual baselines and transfer well.

    As published: eps 4/255, three steps of 2/3 eps from the image itself, each row's best point kept, batch norm in the
    attack as in evaluation; ResNet-50, batch 512, SGD with momentum 0.9 and coupled decay 1e-4, learning rate 0.1
    divided by 10 at one and two thirds of 90 epochs, resized crop and flip. For 224 x 224 pixels the set is prepared at
    that size: `jaxadv data prepare FOLDER --name imagenet --size 224`, then `--data tfds:imagenet`. Ours: no jitter of
    colors; images of the test set are not cut at their borders.

    The authors' network reaches 63.86 % clean accuracy, and 34.96 % under AutoAttack on 5,000 images by RobustBench
    (which counts 64.02 % clean). The recipe has not been run here at that size.

    Args:
      data: training source, images of one size.
      seed: of the initial weights.
      eps: budget; default 4/255.
      epochs: passes over the training data.
      lr: first learning rate.
      net: network, see `models.NETS`; one that has `width` and `depths`.
      width: of the network.
      depths: blocks of its stages.
      validation: see `recipes.standard_mnist`.
      **overrides: any argument of `fit`. The batch is 512 or a tenth of smaller data; on accelerators take
        `precision="bfloat16"`, and `remat=True` where memory ends.

    Returns:
      The arguments of `fit`.

    References:
      Salman et al. 2020, Do adversarially robust ImageNet models transfer better?, arXiv:2007.08489, appendix A; code
      MadryLab/robustness, whose defaults decide where the paper is silent.
    """
    threat = linf(eps, 4 / 255, data)
    attack = attacks.pgd(threat, steps=3, step_size=threat.eps * (2 / 3), start="zero", name="pgd_at")
    means = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if data.shape[-1] == len(IMAGENET_MEAN) else {}
    drops = ((1 / 3, 0.1), (2 / 3, 0.1))
    return assemble(
        data,
        validation,
        overrides,
        steps=passes(epochs),
        trainable=network(net, seed, width=width, depths=tuple(depths), **means),
        objective=lambda _: objectives.pgd_at(attack, bn_attack="eval"),
        optimizer=lambda steps: torch_sgd(schedules.piecewise(lr, steps, drops=drops), 1e-4),
        batch_size=lambda n: min(512, max(1, n // 10)),
        attack=judge(threat),
        augment=augment.chain(augment.resized_crop(), augment.flip()),
    )
