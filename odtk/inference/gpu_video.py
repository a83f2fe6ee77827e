"""Video files decoded by the GPU (NVDEC, through NVIDIA's package PyNvVideoCodec), as frames like those of PyAV.

PyAV stays what reads the file: packets, timestamps, rotation and the meaning of the colors come from it. What the GPU
is not used for, or fails at, PyAV decodes as if there were no GPU.

PyNvVideoCodec is used as its guide has it: https://docs.nvidia.com/video-technologies/pynvvideocodec/pynvc-api-prog-guide
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..text import first_line

CODECS = {"h264": "H264", "hevc": "HEVC", "vp9": "VP9", "av1": "AV1"}  # FFmpeg's name → cudaVideoCodec
START_CODES = {"h264": "h264_mp4toannexb", "hevc": "hevc_mp4toannexb"}  # what NVDEC needs, and .mp4 and .mkv lack
FULL_RANGE = 2  # of luma and chroma: 0 to 255, in FFmpeg's enumeration
BT601 = (0.299, 0.114)  # parts of red and blue in luma (ITU-T H.273, table 4)
LUMA = {
    1: (0.2126, 0.0722),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
    10: (0.2627, 0.0593),
}  # FFmpeg's number of a matrix


class NotOnGpuError(Exception):
    """Why the CPU decodes a video, in words that fit behind a colon."""


class GpuFrame:
    """A frame on the GPU, until the next packet is decoded. Its members mean what those of av.VideoFrame mean.

    Attributes:
        time: its timestamp in seconds.
        rotation: degrees, counterclockwise.
    """

    def __init__(self, decoder: GpuDecoder, decoded: Any, time: float, rotation: int) -> None:
        self._decoder, self._decoded, self.time, self.rotation = decoder, decoded, time, rotation

    def to_ndarray(self, *, format: str) -> np.ndarray:
        """Its pixels, uint8 [H, W, 3] RGB, in the memory of the CPU.

        Raises:
            NotOnGpuError: the GPU failed, or the frame has another size than the first one.
        """
        assert format == "rgb24"
        return self._decoder.download(self._decoded)


class GpuDecoder:
    """Decodes the packets of one file, in the thread that made it.

    Attributes:
        damaged: packets that were damaged, or of which no frame came; complete after the last packet.
    """

    def __init__(self, nvc: Any, stream: Any, first: Any, device: torch.device) -> None:
        """
        Args:
            nvc: the module PyNvVideoCodec.
            stream: of the file (av.video.stream.VideoStream).
            first: its first frame (av.VideoFrame), for what NVDEC does not tell.

        Raises:
            NotOnGpuError: NVDEC does not take such a video.
        """
        from av.bitstream import BitStreamFilterContext

        self._nvc, self._time_base, self._rotation = nvc, Fraction(stream.time_base), first.rotation
        self._size = (first.height, first.width)
        self._luma, self._full = LUMA.get(int(first.colorspace), BT601), int(first.color_range) == FULL_RANGE
        self.damaged, self._began = 0, False
        self._awaited: set[int] = set()  # timestamps of packets whose frames did not come yet
        self._hidden: set[int] = set()  # of packets that an edit list leaves out
        codec = stream.codec_context.codec.canonical_name
        self._filter = BitStreamFilterContext(START_CODES[codec], stream) if codec in START_CODES else None
        gpu = torch.cuda.current_device() if device.index is None else device.index
        kind = getattr(nvc.cudaVideoCodec, CODECS[codec])
        can = nvc.GetDecoderCaps(gpuid=gpu, codec=kind)  # of 8 bits in 4:2:0
        fits = can["width_min"] <= first.width <= can["width_max"]
        if not (can["supported"] and fits and can["height_min"] <= first.height <= can["height_max"]):
            raise NotOnGpuError(f"this GPU does not decode {codec} of {first.width}×{first.height} pixels")
        self._stream = torch.cuda.Stream(gpu)
        self._decoder = nvc.CreateDecoder(
            gpuid=gpu, codec=kind, cudastream=self._stream.cuda_stream, usedevicememory=True
        )

    def decode(self, packet: Any) -> Iterator[GpuFrame]:
        """The frames that are complete with a packet (av.Packet), in the order of their times; empties the packet.

        Raises:
            av.error.FFmpegError: the packet is damaged; the next one may be given.
            NotOnGpuError: the GPU failed, or the packet has no timestamp; also while the frames are taken.
        """
        if not packet.size:
            return self._end()
        at, hidden, corrupt = packet.pts, packet.is_discard, packet.is_corrupt
        if at is None:
            raise NotOnGpuError("not all of its packets have timestamps")
        parts = [packet] if self._filter is None else self._filter.filter(packet)
        if hidden:
            self._hidden.add(at)
        elif corrupt:
            self.damaged += 1
        else:
            self._awaited.add(at)
        return (frame for part in parts for frame in self._decode(part, at))

    def _end(self) -> Iterator[GpuFrame]:
        yield from self._decode(None, 0)
        self.damaged += len(self._awaited)

    def _decode(self, part: Any, at: int) -> Iterator[GpuFrame]:
        """The frames that come when a packet with start codes is given; None: those that are left at the end."""
        data = self._nvc.PacketData()
        if part is not None:
            data.bsl_data, data.bsl, data.pts = part.buffer_ptr, part.buffer_size, at
        try:
            decoded = self._decoder.Decode(data)
        except Exception as error:  # its own classes, and what pybind11 makes of C++'s
            raise failure(error) from error
        for frame in decoded:
            at = frame.getPTS()
            if at in self._hidden:
                continue
            if not self._began:  # what depends on frames of before the file's first one cannot be decoded
                self._began, self._awaited = True, {other for other in self._awaited if other >= at}
            self._awaited.discard(at)
            yield GpuFrame(self, frame, float(at * self._time_base), self._rotation)

    def download(self, decoded: Any) -> np.ndarray:
        """The pixels of a decoded frame of PyNvVideoCodec, as GpuFrame.to_ndarray."""
        try:
            with torch.cuda.stream(self._stream):  # in which it was decoded
                nv12 = torch.from_dlpack(decoded)
                height, width = self._size
                if nv12.dtype == torch.uint8 and nv12.shape == (height * 3 // 2, width):
                    return nv12_to_rgb(nv12, *self._luma, full=self._full).cpu().numpy()
        except Exception as error:
            raise failure(error) from error
        raise NotOnGpuError(f"a frame came as {list(nv12.shape)}, not as {width}×{height} pixels of NV12")


def open_decoder(stream: Any, first_frame: Callable[[], Any], device: str) -> GpuDecoder | None:
    """The GPU's decoder for a file; None where there is no GPU to use, or PyNvVideoCodec is not installed.

    Args:
        stream: of the file (av.video.stream.VideoStream).
        first_frame: gives its first frame as PyAV decodes it, or None.
        device: that the model runs on, such as cuda:0.

    Raises:
        NotOnGpuError: the CPU is to decode this file.
    """
    if torch.device(device).type != "cuda":
        return None
    logging.getLogger("PyNvVideoCodec").disabled = True  # what it says of a missing driver is in its error
    try:
        import PyNvVideoCodec as nvc
    except ModuleNotFoundError:
        return None
    except Exception as error:
        raise NotOnGpuError(f"PyNvVideoCodec cannot be used ({first_line(error).rstrip('.')})") from error
    codec = stream.codec_context.codec.canonical_name
    if codec not in CODECS:
        raise NotOnGpuError(f"the GPU is used for {', '.join(CODECS)}, not for {codec}")
    first = first_frame()
    if first is None:
        raise NotOnGpuError("its first frame cannot be decoded")
    if first.format.name not in ("yuv420p", "yuvj420p"):
        raise NotOnGpuError(f"the GPU is used for 8 bits in 4:2:0, not for {first.format.name}")
    if first.width % 2 or first.height % 2:
        raise NotOnGpuError(f"the GPU is used for even sizes, not for {first.width}×{first.height} pixels")
    if first.interlaced_frame:
        raise NotOnGpuError("it is interlaced")
    try:
        return GpuDecoder(nvc, stream, first, torch.device(device))
    except NotOnGpuError:
        raise
    except Exception as error:
        raise failure(error) from error


def nv12_to_rgb(nv12: Tensor, red: float, blue: float, *, full: bool) -> Tensor:
    """Pixels in RGB, as FFmpeg's swscale converts 4:2:0: each chroma sample is that of its four pixels.

    Args:
        nv12: uint8 [H * 3 / 2, W]: H rows of luma, then H / 2 rows of pairs (Cb, Cr). H and W are even.
        red, blue: their parts in luma (ITU-T H.273, equations 38 to 40: KR and KB).
        full: luma and chroma span 0 to 255, not 16 to 235 and 16 to 240.

    Returns:
        uint8 [H, W, 3], on the same device.
    """
    height, width = nv12.shape[0] * 2 // 3, nv12.shape[1]
    luma = nv12[:height].float()
    chroma = nv12[height:].reshape(height // 2, width // 2, 2).float() - 128
    if not full:
        luma, chroma = (luma - 16) * (255 / 219), chroma * (255 / 224)
    cb, cr = chroma.unbind(2)
    more_red, more_blue = 2 * (1 - red) * cr, 2 * (1 - blue) * cb  # than luma
    more_green = -(red * more_red + blue * more_blue) / (1 - red - blue)
    tint = torch.stack((more_red, more_green, more_blue), 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return (luma[:, :, None] + tint).round().clamp(0, 255).byte()


def failure(error: Exception) -> NotOnGpuError:
    """An error of the GPU, of its decoder or of torch."""
    return NotOnGpuError(f"the GPU failed ({first_line(error).rstrip('.')})")
