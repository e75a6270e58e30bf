// SPDX-License-Identifier: Apache-2.0
// The Python module. This is the only translation unit: it includes every header.

#include <torch/csrc/utils/pybind.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "blocked.h"
#include "greedy.h"
#include "int4.h"
#include "integers.h"
#include "layer.h"
#include "linear.h"
#include "memory.h"
#include "norm.h"
#include "packing.h"
#include "step.h"
#include "tile.h"

namespace {

// A kind of layer, made of four weights: query_key_value, dense_h_to_4h, dense, dense_4h_to_h.
template <typename Kind, typename Weight>
auto define_layer(pybind11::module_& m, const char* name) {
  namespace py = pybind11;
  return py::class_<Kind, gptneox::Layer, std::shared_ptr<Kind>>(m, name).def(
      py::init([](std::vector<at::Tensor> norms, std::vector<std::shared_ptr<Weight>> weights,
                  std::vector<std::optional<at::Tensor>> biases, double eps, int activation) {
        auto layer = std::make_shared<Kind>();
        layer->norms[0] = {norms.at(0), norms.at(1)};
        layer->norms[1] = {norms.at(2), norms.at(3)};
        layer->qkv = weights.at(0);
        layer->up = weights.at(1);
        layer->dense = weights.at(2);
        layer->down = weights.at(3);
        layer->qkv_bias = biases.at(0);
        layer->up_bias = biases.at(1);
        layer->out_bias = biases.at(2);
        layer->eps = static_cast<float>(eps);
        layer->activation = static_cast<gptneox::Activation>(activation);
        layer->prepare();
        return layer;
      }),
      py::arg("norms"), py::arg("weights"), py::arg("biases"), py::arg("eps"),
      py::arg("activation"));
}

} // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using namespace gptneox;
  using Release = py::call_guard<py::gil_scoped_release>;
  py::class_<Packed, std::shared_ptr<Packed>>(m, "Packed")
      .def_property_readonly(
          "format", [](const Packed& p) { return std::string(c10::toString(p.panels.scalar_type())); })
      .def_property_readonly("nbytes", [](const Packed& p) {
        size_t bytes = p.panels.nbytes();
        for (const auto& beside : {p.scales, p.zeros}) {
          bytes += beside.defined() ? beside.nbytes() : 0;
        }
        return bytes;
      });
  py::class_<PackedIntegers, std::shared_ptr<PackedIntegers>>(m, "PackedIntegers")
      .def_property_readonly("nbytes", [](const PackedIntegers& p) {
        return p.panels.nbytes() + p.scales.nbytes() + p.start.nbytes();
      });
  py::class_<Layer, std::shared_ptr<Layer>>(m, "Layer")
      .def("front", &Layer::front, Release(), py::arg("x"))
      .def(
          "back", &Layer::back, Release(), py::arg("attended"), py::arg("mlp"),
          py::arg("residual"));
  define_layer<FloatLayer, Packed>(m, "FloatLayer");
  define_layer<IntegerLayer, PackedIntegers>(m, "IntegerLayer")
      .def_readonly("shares_inputs", &IntegerLayer::shares_inputs);
  py::class_<StepAttention>(m, "Step")
      .def(
          py::init<const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&,
                   int64_t, double, const std::optional<at::Tensor>&>(),
          py::kw_only(), py::arg("cache"), py::arg("positions"), py::arg("cos"), py::arg("sin"),
          py::arg("slots"), py::arg("block_tables"), py::arg("cu_seqlens"), py::arg("context_lens"),
          py::arg("num_decodes"), py::arg("scale"), py::arg("starts"))
      .def("attend", &StepAttention::attend, Release(), py::arg("qkv"), py::arg("cache"))
      .def("run", &run_layers, Release(), py::arg("x"), py::arg("layers"), py::arg("caches"));
  m.def(
      "pack", &pack, Release(), py::arg("weight"), py::arg("scales") = std::optional<at::Tensor>());
  m.def(
      "pack_int4", &pack_int4, Release(), py::arg("values"), py::arg("scales"), py::arg("zeros"),
      py::arg("rounds"), py::arg("digits"));
  m.def(
      "linear", &linear, Release(), py::arg("x"), py::arg("weight"), py::arg("bias"),
      py::arg("activation"));
  m.def(
      "pack_integers", &pack_integers, Release(), py::arg("weight"), py::arg("scales"),
      py::arg("start"), py::arg("input_scale"), py::arg("input_offset"), py::arg("digits"));
  m.def(
      "linear_integers", &linear_integers, Release(), py::arg("x"), py::arg("weight"),
      py::arg("bias"), py::arg("activation"));
  m.def(
      "layer_norm", &layer_norm, Release(), py::arg("x"), py::arg("scale"), py::arg("shift"),
      py::arg("eps"));
  m.def("greedy", &greedy, Release(), py::arg("logits"));
  m.def(
      "allocate",
      [](std::vector<int64_t> sizes, const at::Tensor& like) {
        return allocate(sizes, like.scalar_type());
      },
      py::arg("sizes"), py::arg("like"));
  m.def("describe", &describe);
  m.def(
      "set_blocked_from",
      [](int64_t bf16, int64_t fp16, int64_t fp32, int64_t int4, int64_t int4_rounded,
         int64_t integers) {
        blocked_from = {bf16, fp16, fp32, int4, int4_rounded};
        integers_blocked_from = integers;
      },
      py::arg("bf16"), py::arg("fp16"), py::arg("fp32"), py::arg("int4"),
      py::arg("int4_rounded"), py::arg("integers"));
  m.def("blocked_from", [] {
    return std::make_tuple(
        blocked_from.bf16, blocked_from.fp16, blocked_from.fp32, blocked_from.int4,
        blocked_from.int4_rounded, integers_blocked_from);
  });
}
