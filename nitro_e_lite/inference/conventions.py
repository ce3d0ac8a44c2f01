"""What people who know diffusers expect of a pipeline besides drawing: LoRA, callbacks that steer, the usual names."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from torch import Tensor

from nitro_e_lite.errors import InvalidValue
from nitro_e_lite.model import adapters


@dataclass
class Call:
    """A call of a pipeline while it runs: what callbacks look at and change.

    Attributes:
        guidance: strength of classifier-free guidance from the next step on; up to 1 it is off.
        features: text features `(2B, L, D)`, negative first, or `(B, L, D)` without guidance.
        total: steps of the walk.
        attention_kwargs: for the transformer.
        generators: of the noise that is put back between steps, where it is.
        timestep: of the step in progress.
        interrupted: no further step is done.
        running: it has not ended.
    """

    guidance: float
    features: Tensor | None = None
    total: int = 0
    attention_kwargs: dict[str, Any] | None = None
    generators: Sequence[torch.Generator] = ()
    timestep: float | None = None
    interrupted: bool = False
    running: bool = False


class Conventions(SanaLoraLoaderMixin):
    """Base of the pipelines: diffusers' LoRA methods and names.

    The state of a call belongs to the thread that made it, so that several threads can draw with one pipeline. A thread
    that draws nothing itself, such as that of a stop button, interrupts the calls of all others. Only a LoRA's scale
    (`attention_kwargs`) is set on the layers themselves, for all threads: draw such calls one by one.
    """

    @contextmanager
    def _begin(self, call: Call) -> Iterator[None]:
        """Inside, `call` is the one in progress in this thread."""
        self.__dict__.setdefault("_calls", {})[threading.get_ident()] = call
        call.running = True
        try:
            yield
        finally:
            call.running = False

    @property
    def _call(self) -> Call:
        """The call that this thread made last."""
        return self.__dict__.get("_calls", {}).get(threading.get_ident(), Call(self.config.default_guidance))

    @property
    def guidance_scale(self) -> float:
        """Strength of guidance of the call in progress."""
        return self._call.guidance

    @property
    def _guidance_scale(self) -> float:
        return self._call.guidance

    @_guidance_scale.setter
    def _guidance_scale(self, value: float) -> None:
        self._call.guidance = value

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Does the call in progress use guidance?"""
        return self._call.guidance > 1

    @property
    def num_timesteps(self) -> int:
        """Steps of the call in progress."""
        return self._call.total

    @property
    def current_timestep(self) -> float | None:
        """What the transformer is told now."""
        return self._call.timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """As given to the call in progress."""
        return self._call.attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Was the call in progress stopped? A callback does that by `pipeline._interrupt = True`."""
        return self._call.interrupted

    @property
    def _interrupt(self) -> bool:
        return self._call.interrupted

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        own = self._call
        others = [call for call in [*self.__dict__.get("_calls", {}).values()] if call.running]
        for call in [own] if own.running else others:
            call.interrupted = value

    @classmethod
    def lora_state_dict(cls, source: Any, return_lora_metadata: bool = False, **options: Any) -> Any:
        """As in diffusers; also reads PEFT folders with their scale."""
        weights, config = adapters.fetch(source, options)
        return (weights, config) if return_lora_metadata else weights

    def enable_vae_tiling(self) -> None:
        """Decodes large pictures in tiles, which takes less memory."""
        self.vae.enable_tiling()

    def disable_vae_tiling(self) -> None:
        """Decodes pictures whole."""
        self.vae.disable_tiling()

    def enable_vae_slicing(self) -> None:
        """Decodes the pictures of a batch one by one."""
        self.vae.enable_slicing()

    def disable_vae_slicing(self) -> None:
        """Decodes the pictures of a batch together."""
        self.vae.disable_slicing()

    @classmethod
    def from_single_file(cls, path: Any, **options: Any) -> None:
        """Refused: an official file holds a transformer alone.

        Raises:
            ValueError: always; it says what to use.
        """
        hint = f"nitro_e_lite.load_pipeline({str(path)!r}) adds the encoders"
        raise InvalidValue(f"from_single_file: {path} would be a transformer alone; {hint}")
