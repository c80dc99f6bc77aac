"""stand-in until merged"""

import torch


def affine(moments, weight, bias, eps):
    scale = torch.rsqrt(moments[1] + eps)
    if weight is not None:
        scale = weight.to(scale.dtype) * scale
    shift = -scale * moments[0]
    if bias is not None:
        shift = shift + bias
    return torch.stack((scale, shift))


def coefficients(sums, affine, moments, eps, count, frozen):
    a = affine[0]
    if frozen:
        z = torch.zeros_like(a)
        return torch.stack((a, z, z, moments[0]))
    return torch.stack((a, -a / (moments[1] + eps) * sums[1] / count, -a * sums[0] / count, moments[0]))


def running_moments(module):
    return torch.stack((module.running_mean, module.running_var))


def update_running(module, moments, count):
    if module.training and module.track_running_stats:
        module.num_batches_tracked.add_(1)
        f = module.momentum if module.momentum is not None else 1.0 / float(module.num_batches_tracked)
        module.running_mean.lerp_(moments[0].to(module.running_mean.dtype), f)
        module.running_var.lerp_((moments[1] * (count / (count - 1))).to(module.running_var.dtype), f)
