// OdtkNms: the candidates of OdtkDecode -> the detections, after suppression per class.
//
// May include csrc/cuda and TensorRT, but not torch or csrc/engine.
//
// Inputs: scores [N, M] fp32, boxes [N, M, box_values] fp32, classes [N, M] int32; box_values is 4, or 6 for rotated
// boxes (then the IoU is that of the polygons). Outputs, by descending score, unused rows zero: scores [N, D] fp32,
// boxes [N, D, box_values] fp32, classes [N, D] int32.
//
// Nothing is computed from the optional field "metadata": a plan keeps it for csrc/engine/engine.h.
#include "../cuda/nms.h"
#include "plugin.h"

namespace odtk {
namespace {

using nvinfer1::PluginTensorDesc;

class NmsPlugin final : public PluginBase<NmsPlugin> {
 public:
  static constexpr const char* kName = "OdtkNms";
  static constexpr int kOutputs = 3;

  template <typename Plugin, typename Visitor>
  static void visit(Plugin& plugin, Visitor&& visitor) {
    visitor("box_values", plugin.box_values_, "values");
    visitor("threshold", plugin.threshold_);
    visitor("detections", plugin.detections_);
    visitor.optional("metadata", plugin.metadata_);
  }

  void check() const {
    if (box_values_ != 4 && box_values_ != 6)
      throw std::invalid_argument("field 'box_values' must be 4 or 6 (rotated), not " + std::to_string(box_values_));
    if (!(threshold_ >= 0.f && threshold_ <= 1.f))
      throw std::invalid_argument("field 'threshold' must lie in [0, 1], not " + std::to_string(threshold_));
    if (detections_ < 1)
      throw std::invalid_argument("field 'detections' must be positive, not " + std::to_string(detections_));
    keep_metadata(metadata_);  // an engine that is being loaded makes its plugins anew: this is how it is read
  }

  static DataType output_type(int output) { return output == 2 ? DataType::kINT32 : DataType::kFLOAT; }

  void output_shapes(const nvinfer1::DimsExprs* inputs, int count, nvinfer1::DimsExprs* outputs,
                     nvinfer1::IExprBuilder& builder) const {
    if (count != 3)
      throw std::invalid_argument("needs 3 inputs (scores, boxes, classes), not " + std::to_string(count));
    if (inputs[0].nbDims != 2 || inputs[1].nbDims != 3 || inputs[2].nbDims != 2)
      throw std::invalid_argument("needs scores [N, M], boxes [N, M, box_values], classes [N, M]");
    const auto* values = inputs[1].d[2];
    if (!values->isConstant() || values->getConstantValue() != box_values_)
      throw std::invalid_argument("boxes must have " + std::to_string(box_values_) + " values (field 'box_values')");
    const auto* batch = inputs[0].d[0];
    const auto* rows = builder.constant(detections_);
    outputs[0] = {2, {batch, rows}};
    outputs[1] = {3, {batch, rows, values}};
    outputs[2] = {2, {batch, rows}};
  }

  bool supports(const PluginTensorDesc* tensors, int position, int) const {
    const PluginTensorDesc& tensor = tensors[position];  // scores, boxes, classes in; scores, boxes, classes out
    return tensor.format == nvinfer1::TensorFormat::kLINEAR && tensor.type == output_type(position % 3);
  }

  std::size_t workspace(const PluginTensorDesc* inputs, int) const { return nms_workspace(params(inputs)); }

  void enqueue(const PluginTensorDesc* descs, const void* const* inputs, void* const* outputs, void* workspace,
               cudaStream_t stream) const {
    const NmsParams p = params(descs);
    nms(p, static_cast<const float*>(inputs[0]), static_cast<const float*>(inputs[1]),
        static_cast<const std::int32_t*>(inputs[2]), static_cast<float*>(outputs[0]), static_cast<float*>(outputs[1]),
        static_cast<std::int32_t*>(outputs[2]), workspace, nms_workspace(p), stream);
  }

 private:
  NmsParams params(const PluginTensorDesc* inputs) const {
    NmsParams p;
    p.batch = static_cast<std::int32_t>(inputs[0].dims.d[0]);
    p.count = static_cast<std::int32_t>(inputs[0].dims.d[1]);
    p.detections = detections_;
    p.box_values = box_values_;
    p.threshold = threshold_;
    return p;
  }

  std::int32_t box_values_ = 0;
  float threshold_ = 0.f;
  std::int32_t detections_ = 0;
  std::vector<std::int32_t> metadata_;
};

}  // namespace

PluginCreator& nms_creator() {
  static Creator<NmsPlugin> creator;
  return creator;
}

}  // namespace odtk
