"""The driver's calls that torch does not offer, through ctypes: pinning, copies by address, and the capture mode.

Why the driver and not the runtime behind `torch.cuda.cudart()`: a call of the runtime that is refused leaves its error
for the next kernel launch of the same thread, which then raises in the middle of the user's training. The driver's
calls leave nothing. Copies by address need no tensors over the arena, which would keep its mappings from closing.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator

from .errors import CaptureError

_LIBRARY = "libcuda.so.1"
_REGISTER_PORTABLE = 1  # pinned for the contexts of all devices
_CAPTURE_MODE_RELAXED = 2


class Driver:
    """libcuda. Every method may be called on any thread; those that copy need the device's context (`use`).

    Raises:
        CaptureError: there is no such library: the state lies on a device that is not CUDA's.
    """

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise CaptureError(
                "state on a device can be captured with CUDA only", library=_LIBRARY, cause=str(error)
            ) from error
        address, size, stream = ctypes.c_uint64, ctypes.c_size_t, ctypes.c_void_p
        self._to_host = self._call("cuMemcpyDtoHAsync_v2", address, address, size, stream)
        self._to_device = self._call("cuMemcpyHtoDAsync_v2", address, address, size, stream)
        self._register = self._call("cuMemHostRegister_v2", address, size, ctypes.c_uint)
        self._unregister = self._call("cuMemHostUnregister", address)
        self._exchange = self._call("cuThreadExchangeStreamCaptureMode", ctypes.c_void_p)
        self._get_context = self._call("cuCtxGetCurrent", ctypes.c_void_p)
        self._set_context = self._call("cuCtxSetCurrent", ctypes.c_void_p)
        self._name = self._call("cuGetErrorName", ctypes.c_int, ctypes.c_void_p)

    def _call(self, name: str, *arguments: type) -> ctypes._NamedFuncPointer:
        function = self._library[name]
        function.argtypes, function.restype = list(arguments), ctypes.c_int
        return function

    # --- contexts -----------------------------------------------------------------------------------------------
    def context(self) -> int:
        """The calling thread's context; 0 if it has none yet."""
        found = ctypes.c_void_p()
        self._check(self._get_context(ctypes.byref(found)), "cuCtxGetCurrent")
        return found.value or 0

    def use(self, context: int) -> None:
        """Make `context` the calling thread's."""
        self._check(self._set_context(context), "cuCtxSetCurrent")

    @contextlib.contextmanager
    def unconfined(self) -> Iterator[None]:
        """Calls of this thread neither disturb nor are refused by a graph capture that another thread has under way."""
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        self._check(self._exchange(ctypes.byref(mode)), "cuThreadExchangeStreamCaptureMode")
        try:
            yield
        finally:
            self._exchange(ctypes.byref(mode))

    # --- pinning ------------------------------------------------------------------------------------------------
    def register(self, address: int, nbytes: int) -> str:
        """Pin host memory. Returns the driver's word for why not; empty if it is pinned."""
        return self._error_name(self._register(address, nbytes, _REGISTER_PORTABLE))

    def unregister(self, address: int) -> None:
        """Unpin; what is not pinned is left alone."""
        self._unregister(address)

    # --- copies -------------------------------------------------------------------------------------------------
    def copy_to_host(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Enqueue; returns at once if the host memory is pinned.

        Raises:
            CaptureError: the driver refused.
        """
        result = self._to_host(destination, source, nbytes, stream)
        if result:
            self._check(result, "cuMemcpyDtoHAsync")

    def copy_to_device(self, destination: int, source: int, nbytes: int, stream: int) -> None:
        """Like `copy_to_host`, the other way."""
        result = self._to_device(destination, source, nbytes, stream)
        if result:
            self._check(result, "cuMemcpyHtoDAsync")

    def _check(self, result: int, call: str) -> None:
        if result:
            raise CaptureError("the CUDA driver refused a call", call=call, error=self._error_name(result))

    def _error_name(self, result: int) -> str:
        if not result:
            return ""
        text = ctypes.c_char_p()
        if self._name(result, ctypes.byref(text)) or text.value is None:
            return f"error {result}"
        return text.value.decode()
