"""How the networks compute: in which precision and memory layout, and compiled or not (`options.add_speed`)."""

import torch
import torch.nn as nn

from synco import metrics
from synco.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Precision:
    """Autocast, loss scaling and layout on a device. The loss head is not concerned: it computes in float32.

    amp: "off", "bf16" or "fp16"; tf32: whether float32 products and convolutions may use TensorFloat-32 (None:
    torch's own choice, convolutions only), for the whole process.
    Raises UserError where the device cannot do what is asked.

    `scaler` scales the loss so that fp16 gradients do not vanish; else it does nothing. Its state is part of a run.
    """

    def __init__(
        self, device: torch.device, amp: str = "off", *, channels_last: bool = False, tf32: bool | None = None
    ) -> None:
        if amp == "fp16" and device.type != "cuda":
            raise UserError("--amp fp16 needs a GPU, and this run is on the CPU; --amp bf16 and off work there")
        if amp == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(f"--amp bf16: {torch.cuda.get_device_name(device)} has no bf16; use fp16 or off")
        self.device, self.dtype = device, DTYPES.get(amp)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        if tf32 is not None:
            torch.set_float32_matmul_precision("high" if tf32 else "highest")
            torch.backends.cudnn.allow_tf32 = tf32
            if not tf32 and hasattr(torch.backends.cudnn, "conv"):  # torch >= 2.9, whose "no" there means its default
                torch.backends.cudnn.conv.fp32_precision = torch.backends.cudnn.rnn.fp32_precision = "ieee"

    @property
    def fused(self) -> bool | None:
        """For optimisers: one kernel on a GPU, which with fp16 reads the scaler's verdict where the host would."""
        return True if self.device.type == "cuda" else None  # None: torch's choice

    def autocast(self) -> torch.autocast:
        """Around the forward pass."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    def place(self, x: nn.Module | torch.Tensor | list) -> nn.Module | torch.Tensor | list:
        """A module, a tensor or a list of tensors on the device, images in the layout; the host does not wait."""
        if isinstance(x, (list, tuple)):
            return [self.place(part) for part in x]
        layout = self.layout if isinstance(x, nn.Module) or x.ndim == 4 else torch.preserve_format
        return x.to(self.device, non_blocking=True, memory_format=layout)

    def backward(
        self,
        loss: torch.Tensor,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter] | list[list[nn.Parameter]],
        clip: float | None = None,
    ) -> torch.Tensor:
        """Put a loss's gradient into the parameters, cut down to the norm `clip` → its norm before, a 0-dim tensor.

        loss: 0-dim, or those of several heads (heads,) whose parameters are a list each: so are the norms, not cut.
        optimizer: the parameters'. With fp16 a gradient that is not finite counts as 0: `step` leaves it out.
        """
        self.scaler.scale(loss.sum()).backward()
        self.scaler.unscale_(optimizer)
        if loss.ndim:
            norm = torch.stack([metrics.gradient_norm(weights) for weights in parameters])
        else:
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip) if clip else metrics.gradient_norm(parameters)
        return norm.nan_to_num(0, 0, 0) if self.scaler.is_enabled() else norm

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """The optimiser's step, left out by fp16's scaler where a gradient is not finite."""
        if self.scaler.is_enabled():
            _begin_momentum(optimizer)
        self.scaler.step(optimizer)
        self.scaler.update()

    def scale(self) -> torch.Tensor:
        """What the scaler multiplies a loss by, a 0-dim tensor on the device; 1 where there is none."""
        return self.scaler.scale(torch.ones((), device=self.device))

    def check(self, scale: float) -> None:
        """Raise FloatingPointError if the scaler has left step after step out, which its `scale` tells."""
        if scale < 1e-6:
            raise FloatingPointError(
                f"--amp fp16: the gradient is not finite, even of a loss that is scaled by {scale:g}"
            )

    def state_dict(self) -> dict:
        """What a checkpoint is to hold of the scaler; {} where there is none."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Go on from a `state_dict`, if both are of a scaler. Raises ValueError if it does not fit."""
        mine = self.scaler.state_dict()
        if not mine or state == {}:
            return
        numbers = isinstance(state, dict) and all(isinstance(state.get(name), type(mine[name])) for name in mine)
        if not numbers or not 0 < state["scale"] < float("inf"):
            raise ValueError("its scaler state does not fit")
        self.scaler.load_state_dict(state)


def _begin_momentum(optimizer):
    """Momentum of 0 for what has a gradient and no momentum yet: SGD's first step is the same with it.

    A fused SGD would take memory for it as it comes, and leave that to later steps if the scaler has it skip the first.
    """
    for group in optimizer.param_groups:
        if group.get("fused") and group.get("momentum"):
            for weight in group["params"]:
                if weight.grad is not None and optimizer.state[weight].get("momentum_buffer") is None:
                    optimizer.state[weight]["momentum_buffer"] = torch.zeros_like(weight)


def compile_encoders(model: nn.Module, device: torch.device) -> None:
    """Have torch.compile make the encoders faster, in place: their names, and so the checkpoints', stay as they are.

    Raises UserError where the device or the compiler cannot.
    """
    try:  # a few operations show whether there is a compiler that works
        torch.compile(lambda x: (x.sin() * 2).sum())(torch.ones(64, device=device))
    except (RuntimeError, ImportError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:")]
        why = lines[0] if lines else type(error).__name__
        raise UserError(f"--compile cannot work here: {why}") from error
    model.encoder_q.compile()
    model.encoder_k.compile()
