"""A stand-in for PyNvVideoCodec 2.2, as far as odtk uses it, that decodes on the CPU.

Names, arguments and types are those of its guide and of its docstrings; like NVDEC it takes streams with start codes,
and its frames are gone when the next packet is decoded.
"""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch


class PacketData:
    """Bytes at an address, and a timestamp without which frames have none."""

    def __init__(self) -> None:
        self.bsl = self.bsl_data = self.pts = 0


class DecodedFrame:
    def __init__(self, module: StandIn, nv12: np.ndarray, pts: int) -> None:
        self.module, self.pixels, self.pts = module, torch.from_numpy(nv12), pts

    def getPTS(self) -> int:  # noqa: N802
        return self.pts

    def __dlpack__(self, stream: object = 0) -> Any:
        self.module.downloads += 1
        return self.pixels.__dlpack__()

    def __dlpack_device__(self) -> Any:
        return self.pixels.__dlpack_device__()


class Decoder:
    def __init__(self, module: StandIn, codec: str) -> None:
        import av

        self.module, self.packets, self.given = module, 0, []  # type: ignore[var-annotated]
        self.context: Any = av.CodecContext.create({"AV1": "libdav1d"}.get(codec, codec.lower()), "r")

    def Decode(self, data: PacketData, /) -> list[DecodedFrame]:  # noqa: N802
        import av

        for frame in self.given:
            frame.pixels.fill_(255)  # its memory is used again
        if self.packets == self.module.fails_after:
            raise RuntimeError("out of memory\nat NvDecoder.cpp:9")
        self.packets += 1
        packet: Any = None
        if data.bsl:
            packet = av.Packet(ctypes.string_at(data.bsl_data, data.bsl))
            packet.pts = data.pts
        try:
            frames = self.context.decode(packet)
        except av.error.FFmpegError:  # NVDEC does not say it
            frames = []
        self.given = []
        for frame in frames:
            self.module.frames += 1
            if self.module.frames in self.module.lost:
                continue
            size = (32, 32) if self.module.frames == self.module.smaller else (frame.width, frame.height)
            nv12 = frame.reformat(*size, format="nv12").to_ndarray()
            self.given.append(DecodedFrame(self.module, np.array(nv12), frame.pts))
        return self.given


class StandIn:
    """The module. What a test may set: ``caps``, ``lost``, ``smaller`` and ``fails_after``."""

    PacketData = PacketData
    cudaVideoCodec = SimpleNamespace(H264="H264", HEVC="HEVC", VP9="VP9", AV1="AV1")

    def __init__(self) -> None:
        self.caps = {"supported": 1, "width_min": 48, "width_max": 8192, "height_min": 16, "height_max": 8192}
        self.lost: set[int] = set()  # numbers of frames, from 1, that do not come
        self.smaller: int | None = None  # number of a frame, from 1, that comes in another size
        self.fails_after: int | None = None  # packets
        self.created: list[dict[str, Any]] = []
        self.frames = self.downloads = 0

    def GetDecoderCaps(self, gpuid: int = 0, codec: str = "H264") -> dict[str, int]:  # noqa: N802
        return self.caps

    def CreateDecoder(self, **settings: Any) -> Decoder:  # noqa: N802
        self.created.append(settings)
        return Decoder(self, settings["codec"])
