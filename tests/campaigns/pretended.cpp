// A device that torch takes for CUDA, and that computes on the CPU: where tensors lie, what the host waits for and what
// a graph may record are as on a GPU, numbers and times are not. For a torch without CUDA; see pretended.py.
//
// A tensor of it owns CPU memory. Operations are CPU kernels on CPU tensors that alias the arguments; what they return
// is wrapped again. Views are made here, as autograd wants them to share the storage of what they are views of.

#include <ATen/EmptyTensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <cstring>
#include <functional>
#include <set>

namespace {

using namespace c10;
using at::Tensor;

const Device DEVICE(DeviceType::CUDA, 0);

struct Guard final : impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device) const override { return DEVICE; }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream getDefaultStream(Device d) const override { return getStream(d); }
  Stream getNewStream(Device d, int) const override { return getStream(d); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const override { return s; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

// What the host waits for. A graph that is being recorded may not be waited for.
using Tape = std::vector<std::function<void()>>;
std::vector<Tape> tapes;
bool recording = false;
int64_t waited = 0;
const std::set<std::string> READ = {"aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique2",
                                    "aten::unique_dim", "aten::unique_consecutive", "aten::bincount"};

void wait_for(const std::string& what) {
  waited++;
  TORCH_CHECK(!recording, "operation not permitted when stream is capturing: ", what);
}

// The same memory as the other device sees it.
Tensor seen_as(const Tensor& x, Device device) {
  const Storage keep = x.storage();
  DataPtr data(const_cast<void*>(keep.data()), new Storage(keep), [](void* p) { delete static_cast<Storage*>(p); },
               device);
  auto* allocator = device.is_cpu() ? at::getCPUAllocator() : nullptr;  // kernels may resize what they return
  auto storage = make_intrusive<StorageImpl>(StorageImpl::use_byte_size_t(), keep.nbytes(), std::move(data), allocator,
                                             allocator != nullptr);
  const auto key = device.is_cpu() ? DispatchKey::CPU : DispatchKey::CUDA;
  Tensor y = at::detail::make_tensor<TensorImpl>(Storage(storage), DispatchKeySet(key), x.dtype());
  y.unsafeGetTensorImpl()->set_sizes_and_strides(x.sizes(), x.strides(), x.storage_offset());
  if (x.is_conj()) y._set_conj(true);
  if (x.is_neg()) y._set_neg(true);
  return y;
}

Tensor on_cpu(const Tensor& x) { return x.defined() && x.is_cuda() ? seen_as(x, Device(DeviceType::CPU)) : x; }
Tensor on_device(const Tensor& x) { return x.defined() && !x.is_cuda() ? seen_as(x, DEVICE) : x; }

// An output that a kernel has resized lies where its alias does now.
void follow(const Tensor& given, const Tensor& written) {
  if (!given.defined() || !given.is_cuda() || given.sizes() == written.sizes()) return;
  const Tensor fresh = on_device(written.clone());
  given.unsafeGetTensorImpl()->set_storage_keep_dtype(fresh.storage());
  given.unsafeGetTensorImpl()->set_sizes_and_strides(fresh.sizes(), fresh.strides(), 0);
}

// Arguments on the CPU; tensors of the host beside those of the device are refused as CUDA refuses them.
void lower(const std::string& name, IValue& value, bool& device, bool& host) {
  auto one = [&](const Tensor& x) {
    if (x.defined()) (x.is_cuda() ? device : host) |= x.is_cuda() || x.dim() > 0;
    return on_cpu(x);
  };
  if (value.isTensor()) {
    value = one(value.toTensor());
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& x : list) x = one(x);
    value = list;
  } else if (value.isOptionalTensorList()) {  // positions: those of the host are copied, masks are counted
    c10::List<std::optional<Tensor>> list;
    for (std::optional<Tensor> x : value.toOptionalTensorList()) {
      const bool some = x.has_value() && x->defined();
      if (some && (!x->is_cuda() || x->scalar_type() == at::kBool)) wait_for(name);
      list.push_back(some ? std::optional<Tensor>(on_cpu(*x)) : x);
    }
    value = list;
  } else if (value.isDevice()) {
    value = Device(DeviceType::CPU);
  }
}

void lift(IValue& value) {
  if (value.isTensor()) {
    value = on_device(value.toTensor());
  } else if (value.isTensorList()) {
    auto list = value.toTensorVector();
    for (auto& x : list) x = on_device(x);
    value = list;
  }
}

void again(const OperatorHandle& op, const std::vector<IValue>& given, const std::vector<IValue>& results);

// Any operation, by its CPU kernel.
void computed(const OperatorHandle& op, DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const size_t count = schema.arguments().size();
  const size_t begin = stack->size() - count;
  const std::vector<IValue> given(stack->begin() + begin, stack->end());
  if (READ.count(schema.name())) wait_for(schema.name());
  bool device = false;
  bool host = false;
  for (size_t i = 0; i < count; ++i) lower(schema.name(), (*stack)[begin + i], device, host);
  TORCH_CHECK(!(device && host), "Expected all tensors to be on the same device, in ", schema.name());
  at::AutoDispatchBelowADInplaceOrView below;
  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
  std::vector<IValue> written;
  for (size_t i = 0; i < count; ++i) {
    const auto* alias = schema.arguments()[i].alias_info();
    if (alias && alias->isWrite()) written.push_back(given[i]);
  }
  const size_t first = stack->size() - schema.returns().size();
  for (size_t i = 0; i < schema.returns().size(); ++i) {
    IValue& result = (*stack)[first + i];
    const auto* alias = schema.returns()[i].alias_info();
    TORCH_CHECK(!alias || alias->isWrite(), "a view that the pretended device does not make: ", schema.name());
    if (!alias) {
      lift(result);
      continue;
    }
    if (result.isTensor()) follow(written.at(i).toTensor(), result.toTensor());
    result = written.at(i);
  }
  if (recording) {
    const std::vector<IValue> results(stack->begin() + first, stack->end());
    tapes.back().push_back([op, given, results] { again(op, given, results); });
  }
}

// An operation of a graph: what it returned then is written to.
void again(const OperatorHandle& op, const std::vector<IValue>& given, const std::vector<IValue>& results) {
  torch::jit::Stack stack(given.begin(), given.end());
  computed(op, DispatchKeySet(DispatchKey::CUDA), &stack);
  for (size_t i = 0; i < results.size(); ++i) {
    if (op.schema().returns()[i].alias_info()) continue;
    const auto old = results[i].isTensor() ? std::vector<Tensor>{results[i].toTensor()} : results[i].toTensorVector();
    const auto now = results[i].isTensor() ? std::vector<Tensor>{stack[i].toTensor()} : stack[i].toTensorVector();
    for (size_t j = 0; j < old.size(); ++j)
      if (old[j].defined()) on_cpu(old[j]).copy_(on_cpu(now[j]));
  }
}

using Sizes = IntArrayRef;
using Dtype = std::optional<ScalarType>;
using Layout_ = std::optional<Layout>;
using Device_ = std::optional<Device>;
using Flag = std::optional<bool>;
using Format = std::optional<MemoryFormat>;

Tensor empty(Sizes size, Dtype dtype, Layout_, Device_, Flag, Format format) {
  return on_device(at::detail::empty_cpu(size, dtype, kStrided, Device(DeviceType::CPU), false, format));
}

Tensor empty_strided(Sizes size, Sizes stride, Dtype dtype, Layout_, Device_, Flag) {
  return on_device(at::detail::empty_strided_cpu(size, stride, dtype, kStrided, Device(DeviceType::CPU), false));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  if (!self.is_cuda() || (!source.is_cuda() && !non_blocking)) wait_for("a copy to or from the host");
  Tensor to = on_cpu(self);
  const Tensor from = on_cpu(source);
  at::AutoDispatchBelowADInplaceOrView below;
  to.copy_(from);
  if (recording) tapes.back().push_back([to, from]() mutable { to.copy_(from); });
  return self;
}

Scalar item(const Tensor& self) {
  wait_for("item");
  return at::_local_scalar_dense(on_cpu(self));
}

// A view like one of the CPU's.
Tensor like(const Tensor& self, const Tensor& view) {
  auto y = at::detail::make_tensor<TensorImpl>(TensorImpl::VIEW, Storage(self.storage()), self.key_set(), view.dtype());
  y.unsafeGetTensorImpl()->set_sizes_and_strides(view.sizes(), view.strides(), view.storage_offset());
  return y;
}

Tensor as_strided(const Tensor& self, Sizes size, Sizes stride, std::optional<int64_t> offset) {
  return like(self, on_cpu(self).as_strided(size, stride, offset));
}
Tensor view(const Tensor& self, Sizes size) { return like(self, on_cpu(self).view(size)); }
Tensor view_dtype(const Tensor& self, ScalarType dtype) { return like(self, on_cpu(self).view(dtype)); }
Tensor view_as_real(const Tensor& self) { return like(self, at::view_as_real(on_cpu(self))); }
Tensor reshape_alias(const Tensor& self, Sizes size, Sizes stride) {
  return like(self, on_cpu(self).as_strided(size, stride));
}
Tensor unfold(const Tensor& self, int64_t axis, int64_t size, int64_t step) {
  return like(self, on_cpu(self).unfold(axis, size, step));
}

Tensor& set_storage(Tensor& self, Storage source, int64_t offset, Sizes size, Sizes stride) {
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(source);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, stride, offset);
  return self;
}

// Products of half precision in sums of float32, which the CPU has not.
Tensor mm(const Tensor& a, const Tensor& b, ScalarType dtype) { return at::mm(a.to(dtype), b.to(dtype)); }
Tensor bmm(const Tensor& a, const Tensor& b, ScalarType dtype) { return at::bmm(a.to(dtype), b.to(dtype)); }

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&computed>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_local_scalar_dense", item);
  m.impl("as_strided", as_strided);
  m.impl("view", view);
  m.impl("view.dtype", view_dtype);
  m.impl("view_as_real", view_as_real);
  m.impl("_reshape_alias", reshape_alias);
  m.impl("unfold", unfold);
  m.impl("set_.source_Storage_storage_offset", set_storage);
  m.impl("mm.dtype", mm);
  m.impl("bmm.dtype", bmm);
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&computed>());
}

PYBIND11_MODULE(pretended_device, m) {
  // what has a CPU kernel goes by it, before torch makes something else of it out of other operations
  static torch::Library library(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, __LINE__);
  auto& dispatcher = Dispatcher::singleton();
  for (const auto& name : dispatcher.getRegistrationsForDispatchKey(DispatchKey::CPU)) {
    const auto op = dispatcher.findOp(name);
    if (name.getNamespace() != "aten" || !op || op->hasKernelForDispatchKey(DispatchKey::CUDA)) continue;
    const auto called = name.name.substr(6) + (name.overload_name.empty() ? "" : "." + name.overload_name);
    library.impl(called.c_str(), torch::CppFunction::makeFromBoxedFunction<&computed>());
  }
  // torch has asked for its hooks before this file is loaded, and keeps what it was given: their table of functions
  // is exchanged for that of these
  static Hooks hooks;
  auto& given = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  std::memcpy(static_cast<void*>(&given), static_cast<void*>(&hooks), sizeof(void*));
  m.def("waited", [] { return waited; }, "how often the host has waited for the device");
  m.def("begin", [] { tapes.emplace_back(); recording = true; return tapes.size() - 1; });
  m.def("end", [] { recording = false; });
  m.def("replay", [](size_t tape) {
    at::AutoDispatchBelowADInplaceOrView below;
    for (auto& operation : tapes.at(tape)) operation();
  });
}
