// OdtkDecode: the raw head tensors of all levels -> the best candidates of each image, for OdtkNms.
//
// May include csrc/cuda and TensorRT, but not torch or csrc/engine.
//
// The 2L + 1 inputs are the class logits of levels 0 … L-1 [N, A*C, h, w], their box heads [N, A*V, h, w], and the
// anchors [L, A, 4] (fp32, a constant of the graph: x1, y1, x2, y2 of cell (0, 0), pixels). V is head_values(coder).
// Outputs: scores [N, K] fp32, boxes [N, K, 4 or 6] fp32 (x1, y1, x2, y2 inclusive, in pixels of the network's input,
// then sin and cos if the boxes are rotated), classes [N, K] int32.
#include "../cuda/decode.h"
#include "plugin.h"

namespace odtk {
namespace {

using nvinfer1::DimensionOperation;
using nvinfer1::PluginTensorDesc;
using nvinfer1::TensorFormat;

class DecodePlugin final : public PluginBase<DecodePlugin> {
 public:
  static constexpr const char* kName = "OdtkDecode";
  static constexpr int kOutputs = 3;

  template <typename Plugin, typename Visitor>
  static void visit(Plugin& plugin, Visitor&& visitor) {
    visitor("strides", plugin.strides_);
    visitor("classes", plugin.classes_);
    visitor("coder", plugin.coder_, "values");
    visitor("score_threshold", plugin.score_threshold_);
    visitor("top_n", plugin.top_n_);
  }

  void check() const {
    if (levels() > kMaxLevels)
      throw std::invalid_argument("field 'strides' has more than " + std::to_string(kMaxLevels) + " levels");
    for (const std::int32_t stride : strides_)
      if (stride < 1) throw std::invalid_argument("field 'strides' must be positive, not " + std::to_string(stride));
    if (classes_ < 1) throw std::invalid_argument("field 'classes' must be positive, not " + std::to_string(classes_));
    if (head_values(coder()) == 0)
      throw std::invalid_argument("field 'coder' is " + std::to_string(coder_) +
                                  ", but there is no box coder with that number (enum class BoxCoder)");
    if (!(score_threshold_ >= 0.f && score_threshold_ <= 1.f))
      throw std::invalid_argument("field 'score_threshold' must lie in [0, 1], not " +
                                  std::to_string(score_threshold_));
    if (top_n_ < 1 || top_n_ > kMaxTopN)
      throw std::invalid_argument("field 'top_n' must lie in 1 … " + std::to_string(kMaxTopN) + ", not " +
                                  std::to_string(top_n_));
  }

  static DataType output_type(int output) { return output == 2 ? DataType::kINT32 : DataType::kFLOAT; }

  void output_shapes(const nvinfer1::DimsExprs* inputs, int count, nvinfer1::DimsExprs* outputs,
                     nvinfer1::IExprBuilder& builder) const {
    check_inputs(inputs, count);
    const nvinfer1::IDimensionExpr* columns = nullptr;  // the sum over the levels of min(top_n, A*C*h*w)
    for (int l = 0; l < levels(); ++l) {
      const auto& d = inputs[l].d;
      const auto* cells = builder.operation(DimensionOperation::kPROD, *d[2], *d[3]);
      const auto* candidates = builder.operation(DimensionOperation::kPROD, *d[1], *cells);
      const auto* kept = builder.operation(DimensionOperation::kMIN, *candidates, *builder.constant(top_n_));
      columns = columns ? builder.operation(DimensionOperation::kSUM, *columns, *kept) : kept;
    }
    const auto* batch = inputs[0].d[0];
    outputs[0] = {2, {batch, columns}};
    outputs[1] = {3, {batch, columns, builder.constant(box_values(coder()))}};
    outputs[2] = {2, {batch, columns}};
  }

  /// All logits must have one type, and all boxes; all heads are NCHW or all are channels-last. The rest is linear
  /// fp32, except the classes, which are int32.
  bool supports(const PluginTensorDesc* tensors, int position, int inputs) const {
    const PluginTensorDesc& tensor = tensors[position];
    if (position >= 2 * levels()) {
      const bool classes = position == inputs + 2;
      return tensor.format == TensorFormat::kLINEAR && tensor.type == (classes ? DataType::kINT32 : DataType::kFLOAT);
    }
    if (position == 0) return is_head(tensor);
    const int first = position < levels() ? 0 : levels();  // the first logits or the first boxes
    const bool same_type = position == first || tensor.type == tensors[first].type;
    return is_head(tensor) && same_type && is_linear(tensor) == is_linear(tensors[0]);
  }

  std::size_t workspace(const PluginTensorDesc* inputs, int) const { return decode_workspace(params(inputs)); }

  void enqueue(const PluginTensorDesc* descs, const void* const* inputs, void* const* outputs, void* workspace,
               cudaStream_t stream) const {
    DecodeParams p = params(descs);
    for (int l = 0; l < p.levels; ++l) {
      p.level[l].logits = inputs[l];
      p.level[l].boxes = inputs[p.levels + l];
      p.level[l].anchors = static_cast<const float*>(inputs[2 * p.levels]) + l * p.anchors * p.anchor_values;
    }
    decode(p, static_cast<float*>(outputs[0]), static_cast<float*>(outputs[1]), static_cast<std::int32_t*>(outputs[2]),
           workspace, decode_workspace(p), stream);
  }

 private:
  int levels() const { return static_cast<int>(strides_.size()); }
  BoxCoder coder() const { return static_cast<BoxCoder>(coder_); }

  static bool is_linear(const PluginTensorDesc& tensor) { return tensor.format == TensorFormat::kLINEAR; }
  static bool is_head(const PluginTensorDesc& tensor) {
    if (tensor.type == DataType::kFLOAT) return is_linear(tensor) || tensor.format == TensorFormat::kHWC;
    return tensor.type == DataType::kHALF && (is_linear(tensor) || tensor.format == TensorFormat::kHWC8);
  }

  /// Elements per cell in memory: 0 for NCHW, else the number of channels, which kHWC8 pads to a multiple of 8.
  static std::int32_t pitch(const PluginTensorDesc& tensor) {
    const auto channels = static_cast<std::int32_t>(tensor.dims.d[1]);
    if (is_linear(tensor)) return 0;
    return tensor.format == TensorFormat::kHWC8 ? (channels + 7) / 8 * 8 : channels;
  }

  void check_inputs(const nvinfer1::DimsExprs* inputs, int count) const {
    if (count != 2 * levels() + 1)
      throw std::invalid_argument("field 'strides' has " + std::to_string(levels()) + ", so there must be " +
                                  std::to_string(2 * levels() + 1) +
                                  " inputs (logits and boxes of each level, and the anchors), not " +
                                  std::to_string(count));
    const auto size = [](const nvinfer1::IDimensionExpr* expr) {
      return expr->isConstant() ? expr->getConstantValue() : -1;
    };
    const nvinfer1::DimsExprs& anchors = inputs[2 * levels()];
    if (anchors.nbDims != 3 || size(anchors.d[0]) != levels() || size(anchors.d[2]) != 4)
      throw std::invalid_argument("the anchors must be [" + std::to_string(levels()) + ", A, 4]");
    for (int i = 0; i < 2 * levels(); ++i) {
      const bool logits = i < levels();
      const auto channels = size(anchors.d[1]) * (logits ? classes_ : head_values(coder()));
      const std::string name = std::string(logits ? "logits" : "boxes") + " of level " + std::to_string(i % levels());
      if (inputs[i].nbDims != 4) throw std::invalid_argument(name + " must be [N, channels, h, w]");
      if (size(inputs[i].d[1]) != channels)
        throw std::invalid_argument(name + " must be [N, " + std::to_string(channels) + ", h, w], not [N, " +
                                    std::to_string(size(inputs[i].d[1])) + ", h, w]");
    }
  }

  /// Everything but the pointers.
  DecodeParams params(const PluginTensorDesc* inputs) const {
    const auto type = [](DataType t) { return t == DataType::kHALF ? odtk::DataType::kHalf : odtk::DataType::kFloat; };
    DecodeParams p;
    p.batch = static_cast<std::int32_t>(inputs[0].dims.d[0]);
    p.levels = levels();
    p.anchors = static_cast<std::int32_t>(inputs[2 * levels()].dims.d[1]);
    p.classes = classes_;
    p.top_n = top_n_;
    p.score_threshold = score_threshold_;
    p.coder = coder();
    p.logits_type = type(inputs[0].type);
    p.boxes_type = type(inputs[levels()].type);
    for (int l = 0; l < p.levels; ++l) {
      const PluginTensorDesc& logits = inputs[l];
      p.level[l].height = static_cast<std::int32_t>(logits.dims.d[2]);
      p.level[l].width = static_cast<std::int32_t>(logits.dims.d[3]);
      p.level[l].stride = strides_[static_cast<std::size_t>(l)];
      p.level[l].logits_pitch = pitch(logits);
      p.level[l].boxes_pitch = pitch(inputs[p.levels + l]);
    }
    return p;
  }

  std::vector<std::int32_t> strides_;
  std::int32_t classes_ = 0;
  std::int32_t coder_ = 0;
  float score_threshold_ = 0.f;
  std::int32_t top_n_ = 0;
};

}  // namespace

PluginCreator& decode_creator() {
  static Creator<DecodePlugin> creator;
  return creator;
}

}  // namespace odtk
