// The Python module odtk._C, the only file that includes pybind11. May not include torch or TensorRT's headers.
//
// It takes pointers, shapes and the caller's CUDA stream; Python allocates. Device pointers and streams are plain
// integers (in torch: data_ptr(), cuda_stream).
#include <pybind11/native_enum.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/box.cuh"
#include "../cuda/check.h"
#include "../cuda/decode.h"
#include "../cuda/nms.h"
#include "../cuda/rotated_iou.h"

#ifdef ODTK_WITH_TENSORRT
#include <exception>
#include <map>
#include <string_view>
#include <utility>

#include "engine.h"
#endif

namespace py = pybind11;
using py::literals::operator""_a;

namespace {

using Address = std::uintptr_t;
using Array = py::array_t<float, py::array::c_style | py::array::forcecast>;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

/// Why no kernel can run on this machine, or nothing if they can.
std::optional<std::string> device_error() {
  int devices = 0;
  const cudaError_t status = cudaGetDeviceCount(&devices);
  if (status == cudaSuccess && devices > 0) return std::nullopt;
  return std::string(status == cudaSuccess ? "no CUDA device" : cudaGetErrorString(status));
}

/// CudaError becomes RuntimeError, which says what this machine lacks if that is the reason.
void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const odtk::CudaError& e) {
    std::string message = e.what();
    if (const auto reason = device_error()) {
      message = "odtk._C cannot run its CUDA kernels on this machine (" + *reason + "): use tensors on the CPU. " + message;
    } else if (e.code() == cudaErrorNoKernelImageForDevice) {
      message = "odtk._C was built for the architectures " ODTK_ARCHITECTURES
                ", not for this GPU: build again with ODTK_CUDA_ARCH set to its compute capability. " + message;
    }
    PyErr_SetString(PyExc_RuntimeError, message.c_str());
  }
}

// ---- geometry on the host, on numpy arrays ----

/// The rows of an array [n, values]; throws ValueError for any other shape.
py::ssize_t rows(const Array& array, py::ssize_t values, const char* name) {
  if (array.ndim() != 2 || array.shape(1) != values) {
    throw py::value_error(std::string(name) + " must have the shape [n, " + std::to_string(values) + "]");
  }
  return array.shape(0);
}

odtk::Box box_of(const float* v) { return {v[0], v[1], v[2], v[3]}; }
odtk::RotatedBox rotated_box_of(const float* v) { return {box_of(v), v[4], v[5]}; }

Array decode_boxes(odtk::BoxCoder coder, const Array& values, const Array& anchors, int stride,
                   std::pair<int, int> size) {
  const py::ssize_t count = rows(values, odtk::head_values(coder), "values");
  if (rows(anchors, 4, "anchors") != count) throw py::value_error("values and anchors must have equally many rows");
  Array out({count, py::ssize_t{odtk::box_values(coder)}});
  for (py::ssize_t i = 0; i < count; ++i) {
    odtk::decode_box(coder, values.data(i, 0), box_of(anchors.data(i, 0)), stride, size.first, size.second,
                     out.mutable_data(i, 0));
  }
  return out;
}

Array iou(const Array& a, const Array& b) {
  const py::ssize_t n = rows(a, 4, "a"), m = rows(b, 4, "b");
  Array out({n, m});
  for (py::ssize_t i = 0; i < n; ++i) {
    for (py::ssize_t j = 0; j < m; ++j) *out.mutable_data(i, j) = odtk::iou(box_of(a.data(i, 0)), box_of(b.data(j, 0)));
  }
  return out;
}

py::array_t<bool> overlaps(const Array& a, const Array& b, float threshold) {
  const py::ssize_t values = a.ndim() == 2 && a.shape(1) == 6 ? 6 : 4, n = rows(a, values, "a"), m = rows(b, values, "b");
  py::array_t<bool> out({n, m});
  for (py::ssize_t i = 0; i < n; ++i) {
    for (py::ssize_t j = 0; j < m; ++j) {
      const float *u = a.data(i, 0), *v = b.data(j, 0);
      *out.mutable_data(i, j) = values == 6 ? odtk::overlaps(rotated_box_of(u), rotated_box_of(v), threshold)
                                            : odtk::overlaps(box_of(u), box_of(v), threshold);
    }
  }
  return out;
}

void bind_host(py::module_& m) {
  m.def("decode_boxes", &decode_boxes, "coder"_a, "values"_a, "anchors"_a, "stride"_a, "size"_a,
        "Boxes [n, 4 or 6] of a head's values [n, V] and placed anchors [n, 4]; size: (width, height) px of the level.");
  m.def("iou", &iou, "a"_a, "b"_a, "IoU [n, m] of boxes a [n, 4] and b [m, 4], inclusive corners.");
  m.def("overlaps", &overlaps, "a"_a, "b"_a, "threshold"_a,
        "Whether the IoU is above the threshold, [n, m], for boxes [n, 4] or [n, 6]: the test of the NMS kernel.");
  m.def(
      "rotated_iou_host",
      [](const odtk::RotatedIouParams& params, Address a, Address b, Address out) {
        odtk::rotated_iou_host(params, pointer<float>(a), pointer<float>(b), pointer<float>(out));
      },
      "params"_a, "a"_a, "b"_a, "out"_a, py::call_guard<py::gil_scoped_release>(),
      "rotated_iou with host pointers, on the calling thread.");
}

// ---- kernels, on device pointers ----

void bind_kernels(py::module_& m) {
  py::native_enum<odtk::BoxCoder>(m, "BoxCoder", "enum.IntEnum", "What the numbers of a box head mean.")
      .value("ANCHOR_DELTAS", odtk::BoxCoder::kAnchorDeltas)
      .value("ROTATED_DELTAS", odtk::BoxCoder::kRotatedDeltas)
      .value("DISTANCES_CENTERNESS", odtk::BoxCoder::kDistancesCenterness)
      .value("DISTANCES", odtk::BoxCoder::kDistances)
      .value("CENTER_SIZE_ANGLE", odtk::BoxCoder::kCenterSizeAngle)
      .finalize();
  m.attr("MAX_LEVELS") = odtk::kMaxLevels;
  m.attr("MAX_TOP_N") = odtk::kMaxTopN;

  py::class_<odtk::DecodeLevel>(m, "DecodeLevel", "One level's tensors and shape; see csrc/cuda/decode.h.")
      .def(py::init([](Address logits, Address boxes, Address anchors, int height, int width, int stride,
                       int logits_pitch, int boxes_pitch) {
             odtk::DecodeLevel level;
             level.logits = pointer<void>(logits);
             level.boxes = pointer<void>(boxes);
             level.anchors = pointer<float>(anchors);
             level.height = height;
             level.width = width;
             level.stride = stride;
             level.logits_pitch = logits_pitch;
             level.boxes_pitch = boxes_pitch;
             return level;
           }),
           py::kw_only(), "logits"_a, "boxes"_a, "anchors"_a, "height"_a, "width"_a, "stride"_a, "logits_pitch"_a = 0,
           "boxes_pitch"_a = 0);

  py::class_<odtk::DecodeParams>(m, "DecodeParams", "The parameters of one call of decode; see csrc/cuda/decode.h.")
      .def(py::init([](const std::vector<odtk::DecodeLevel>& levels, int batch, int anchors, int classes, int top_n,
                       int anchor_values, double score_threshold, odtk::BoxCoder coder, bool logits_half,
                       bool boxes_half) {
             if (levels.size() > static_cast<std::size_t>(odtk::kMaxLevels)) {
               throw std::invalid_argument("odtk::decode: levels must be 1 to 16");
             }
             odtk::DecodeParams p;
             p.batch = batch;
             p.levels = static_cast<int>(levels.size());
             p.anchors = anchors;
             p.classes = classes;
             p.top_n = top_n;
             p.anchor_values = anchor_values;
             p.score_threshold = score_threshold;
             p.coder = coder;
             p.logits_type = logits_half ? odtk::DataType::kHalf : odtk::DataType::kFloat;
             p.boxes_type = boxes_half ? odtk::DataType::kHalf : odtk::DataType::kFloat;
             for (std::size_t l = 0; l < levels.size(); ++l) p.level[l] = levels[l];
             return p;
           }),
           py::kw_only(), "levels"_a, "batch"_a, "anchors"_a, "classes"_a, "top_n"_a, "anchor_values"_a,
           "score_threshold"_a, "coder"_a, "logits_half"_a, "boxes_half"_a)
      .def_property_readonly("columns", [](const odtk::DecodeParams& p) { return odtk::decode_columns(p); });

  m.def("decode_workspace", &odtk::decode_workspace, "params"_a, "Bytes of scratch memory that decode needs.");
  m.def(
      "decode",
      [](const odtk::DecodeParams& params, Address scores, Address boxes, Address classes, Address workspace,
         std::size_t workspace_bytes, Address stream) {
        odtk::decode(params, pointer<float>(scores), pointer<float>(boxes), pointer<std::int32_t>(classes),
                     pointer<void>(workspace), workspace_bytes, pointer<CUstream_st>(stream));
      },
      "params"_a, "scores"_a, "boxes"_a, "classes"_a, "workspace"_a, "workspace_bytes"_a, "stream"_a,
      py::call_guard<py::gil_scoped_release>(), "Enqueues the decoding; see csrc/cuda/decode.h.");

  py::class_<odtk::NmsParams>(m, "NmsParams", "The parameters of one call of nms; see csrc/cuda/nms.h.")
      .def(py::init([](int batch, int count, int detections, int box_values, float threshold) {
             return odtk::NmsParams{batch, count, detections, box_values, threshold};
           }),
           py::kw_only(), "batch"_a, "count"_a, "detections"_a, "box_values"_a, "threshold"_a);
  m.def("nms_workspace", &odtk::nms_workspace, "params"_a, "Bytes of scratch memory that nms needs.");
  m.def(
      "nms",
      [](const odtk::NmsParams& params, Address scores, Address boxes, Address classes, Address out_scores,
         Address out_boxes, Address out_classes, Address workspace, std::size_t workspace_bytes, Address stream) {
        odtk::nms(params, pointer<float>(scores), pointer<float>(boxes), pointer<std::int32_t>(classes),
                  pointer<float>(out_scores), pointer<float>(out_boxes), pointer<std::int32_t>(out_classes),
                  pointer<void>(workspace), workspace_bytes, pointer<CUstream_st>(stream));
      },
      "params"_a, "scores"_a, "boxes"_a, "classes"_a, "out_scores"_a, "out_boxes"_a, "out_classes"_a, "workspace"_a,
      "workspace_bytes"_a, "stream"_a, py::call_guard<py::gil_scoped_release>(),
      "Enqueues the suppression; see csrc/cuda/nms.h.");

  py::class_<odtk::RotatedIouParams>(m, "RotatedIouParams", "The parameters of one call; see csrc/cuda/rotated_iou.h.")
      .def(py::init([](int batch, int a_count, int b_count, int a_values, int b_values, bool a_shared, bool b_shared,
                       float minimum) {
             return odtk::RotatedIouParams{batch, a_count, b_count, a_values, b_values, a_shared, b_shared, minimum};
           }),
           py::kw_only(), "batch"_a, "a_count"_a, "b_count"_a, "a_values"_a, "b_values"_a, "a_shared"_a = false,
           "b_shared"_a = false, "minimum"_a = 0.0f);
  m.def(
      "rotated_iou",
      [](const odtk::RotatedIouParams& params, Address a, Address b, Address out, Address stream) {
        odtk::rotated_iou(params, pointer<float>(a), pointer<float>(b), pointer<float>(out), pointer<CUstream_st>(stream));
      },
      "params"_a, "a"_a, "b"_a, "out"_a, "stream"_a, py::call_guard<py::gil_scoped_release>(),
      "Enqueues the IoU of all pairs; see csrc/cuda/rotated_iou.h.");
}

// ---- engine ----

#ifdef ODTK_WITH_TENSORRT
/// pip installs TensorRT's libraries in a Python package: tensorrt_libs (10 and newer), or tensorrt itself (8.6).
void find_pip_tensorrt() {
  static bool searched = false;
  if (std::exchange(searched, true)) return;
  const py::object find_spec = py::module_::import("importlib.util").attr("find_spec");
  for (const char* package : {"tensorrt_libs", "tensorrt"}) {
    const py::object spec = find_spec(package);
    if (spec.is_none() || spec.attr("submodule_search_locations").is_none()) continue;
    odtk::set_tensorrt_folder(py::str(py::list(spec.attr("submodule_search_locations"))[0]));
    return;
  }
}

/// Sets a Python callable for TensorRT's messages, which takes a level of the module logging and the message. It is
/// never freed, because TensorRT may log until the process ends.
void set_logger(const py::object& callable) {
  if (callable.is_none()) return odtk::set_logger({});
  auto* function = new py::object(callable);
  odtk::set_logger([function](odtk::LogLevel level, const std::string& line) {
    if (!Py_IsInitialized()) return;
    const py::gil_scoped_acquire gil;
    static constexpr int kLevels[] = {40, 30, 20, 10};  // ERROR, WARNING, INFO, DEBUG
    try {
      (*function)(kLevels[static_cast<int>(level)], line);
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable("odtk._C.set_logger");
    }
  });
}

py::bytes engine_build(const py::bytes& onnx, odtk::BuildOptions options, const py::object& progress) {
  find_pip_tensorrt();
  std::exception_ptr raised;  // by progress, e.g. KeyboardInterrupt: it stops the build and is raised again below
  if (!progress.is_none()) {
    options.progress = [&](const std::string& phase, int step, int steps) {
      const py::gil_scoped_acquire gil;
      try {
        return !progress(phase, step, steps).is(py::bool_(false));
      } catch (py::error_already_set&) {
        raised = std::current_exception();
        return false;
      }
    };
  }
  const std::string_view graph = onnx;
  std::vector<char> plan;
  try {
    const py::gil_scoped_release released;
    plan = odtk::build(graph.data(), graph.size(), options);
  } catch (const odtk::TensorRtError&) {
    if (raised) std::rethrow_exception(raised);
    throw;
  }
  return {plan.data(), plan.size()};
}

py::list engine_tensors(const odtk::Engine& engine) {
  py::list all;
  for (const odtk::TensorInfo& tensor : engine.tensors())
    all.append(py::dict("name"_a = tensor.name, "input"_a = tensor.input, "dtype"_a = tensor.type,
                        "shape"_a = py::tuple(py::cast(tensor.shape))));
  return all;
}

void bind_engine(py::module_& m) {
  m.attr("TENSORRT_HEADERS") = ODTK_TENSORRT_HEADERS;
  m.def("set_logger", &set_logger, "callable"_a,
        "Sets where TensorRT's messages go: callable(level of the module logging, message). With None, errors and "
        "warnings go to stderr.");
  m.def(
      "tensorrt_version",
      [] {
        find_pip_tensorrt();
        const py::gil_scoped_release released;
        return odtk::tensorrt_version();
      },
      "The version of the TensorRT library. RuntimeError, which says what to do, if there is none.");
  m.attr("CAN_BUILD") = odtk::can_build();
  m.attr("LONGEST_METADATA") = odtk::kLongestMetadata;
  m.def(
      "engine_build",
      [](const py::bytes& onnx, std::array<std::int32_t, 3> batch, std::size_t workspace, bool fp16, bool int8, bool tf32,
         bool hardware_compatible, bool version_compatible, const std::vector<std::string>& float_layers,
         const std::string& timing_cache, const std::string& metadata, const py::object& progress) {
        odtk::BuildOptions options;
        options.batch = batch;
        options.workspace = workspace;
        options.fp16 = fp16;
        options.int8 = int8;
        options.tf32 = tf32;
        options.hardware_compatible = hardware_compatible;
        options.version_compatible = version_compatible;
        options.float_layers = float_layers;
        options.timing_cache = timing_cache;
        options.metadata = metadata;
        return engine_build(onnx, std::move(options), progress);
      },
      "onnx"_a, py::kw_only(), "batch"_a, "workspace"_a, "fp16"_a = false, "int8"_a = false, "tf32"_a = true,
      "hardware_compatible"_a = false, "version_compatible"_a = false, "float_layers"_a = std::vector<std::string>{},
      "timing_cache"_a = "", "metadata"_a = "", "progress"_a = py::none(),
      "Builds a plan (bytes) from ONNX (bytes); see BuildOptions in csrc/engine/engine.h. The build stops if "
      "progress(phase, step, steps) returns False.");
  m.def(
      "split_plan",
      [](const py::bytes& file) {
        const std::string_view bytes = file;
        return odtk::split_plan(bytes.data(), bytes.size());
      },
      "file"_a,
      "The size of the plain TensorRT plan in a plan file, and the metadata in the trailer (empty if there is none).");

  py::class_<odtk::Engine>(m, "Engine", "A loaded plan; see csrc/engine/engine.h.")
      .def(py::init([](const py::bytes& plan) {
             find_pip_tensorrt();
             const std::string_view bytes = plan;
             const py::gil_scoped_release released;
             return std::make_unique<odtk::Engine>(bytes.data(), bytes.size());
           }),
           "plan"_a)
      .def_property_readonly(
          "metadata", [](const odtk::Engine& engine) { return py::bytes(engine.metadata()); },
          "The bytes of metadata that engine_build was given, or that the plan's OdtkNms carries.")
      .def_property_readonly("tensors", &engine_tensors, "For each a dict of name, input, dtype, shape (-1: the batch).")
      .def_property_readonly("batch", &odtk::Engine::batch, "The smallest and the largest batch.")
      .def(
          "infer",
          [](odtk::Engine& engine, const std::map<std::string, std::pair<Address, std::vector<std::int64_t>>>& tensors,
             Address stream, bool graph) {
            std::map<std::string, odtk::Binding> bindings;
            for (const auto& [name, tensor] : tensors) bindings[name] = {pointer<void>(tensor.first), tensor.second};
            const py::gil_scoped_release released;
            engine.infer(bindings, pointer<CUstream_st>(stream), graph);
          },
          "tensors"_a, "stream"_a, "graph"_a = false,
          "Enqueues one inference. tensors: name -> (device pointer, shape), for the inputs and the outputs.");
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The compiled kernels of odtk, their geometry on the host, and the TensorRT engine if it was built.";
  py::register_exception_translator(&translate);
  m.attr("CUDA_VERSION") = CUDART_VERSION;
  m.attr("ARCHITECTURES") = ODTK_ARCHITECTURES;
  m.def("device_error", &device_error, "Why no kernel can run on this machine, or None if they can.");
  bind_host(m);
  bind_kernels(m);
#ifdef ODTK_WITH_TENSORRT
  m.attr("WITH_TENSORRT") = true;
  bind_engine(m);
#else
  m.attr("WITH_TENSORRT") = false;
#endif
}
