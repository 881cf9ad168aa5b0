"""Optimizers that others publish, written out where nothing light to install has them."""

import torch


class LarcSgd:
    """apex's LARC around SGD, as its published semantics: the gradient is rewritten, then SGD.

    The adaptive rate is l·‖p‖ / (‖g‖ + wd·‖p‖ + eps); ``clip`` takes min(rate / lr, 1); the
    gradient becomes rate·(g + wd·p) and SGD runs without weight decay.  Layers with a zero norm
    keep their gradient as it is, without weight decay.
    """

    def __init__(self, params, lr, momentum, weight_decay, trust_coefficient, clip, eps):
        self.params = list(params)
        self.sgd = torch.optim.SGD(self.params, lr=lr, momentum=momentum)
        self.weight_decay, self.trust_coefficient = weight_decay, trust_coefficient
        self.clip, self.eps = clip, eps

    @torch.no_grad()
    def step(self):
        for param in self.params:
            p_norm, g_norm = param.norm(), param.grad.norm()
            if p_norm == 0 or g_norm == 0:
                continue
            rate = (
                self.trust_coefficient * p_norm / (g_norm + self.weight_decay * p_norm + self.eps)
            )
            if self.clip:
                rate = min(rate / self.sgd.param_groups[0]["lr"], 1)
            param.grad.add_(param, alpha=self.weight_decay).mul_(rate)
        self.sgd.step()


class OptaxLars:
    """optax's ``lars``: decay, then the ratio of the decayed gradient, rate, then the trace.

    add_decayed_weights → scale_by_trust_ratio(l, eps) → scale(−lr) → trace(momentum, nesterov).
    """

    def __init__(self, params, momentum, weight_decay, trust_coefficient, eps, nesterov):
        self.params = list(params)
        self.momentum, self.weight_decay = momentum, weight_decay
        self.trust_coefficient, self.eps, self.nesterov = trust_coefficient, eps, nesterov
        self.trace = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self, lr):
        for i, param in enumerate(self.params):
            update = param.grad + self.weight_decay * param
            p_norm, u_norm = param.norm(), update.norm()
            ratio = 1.0
            if p_norm > 0 and u_norm > 0:
                ratio = self.trust_coefficient * p_norm / (u_norm + self.eps)
            update = -lr * ratio * update
            self.trace[i] = update + self.momentum * self.trace[i]
            param.add_(update + self.momentum * self.trace[i] if self.nesterov else self.trace[i])
