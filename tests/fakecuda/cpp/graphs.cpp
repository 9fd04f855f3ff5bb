// CUDA graphs: a stream's work is captured once, and a launch of the graph does all of it.
#include <utility>

#include "machine.h"

using namespace fakecuda;

namespace {

thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;
thread_local Stream* own_capture = nullptr;  // the stream that this thread captures
int global_captures = 0;                     // captures that forbid calls in every thread
unsigned long long next_graph = 1;

// torch's two handles, of a graph and of its executable form, are references to one object here.
using Handle = std::shared_ptr<Graph>;

Handle& graph_of(void* handle) {
    return *static_cast<Handle*>(handle);
}

}  // namespace

namespace fakecuda {

bool add_node(Stream& stream, double seconds, std::function<void()> effect, bool kernel) {
    if (!stream.capture) return false;
    stream.capture->graph->nodes.push_back({seconds, kernel, std::move(effect)});
    return true;
}

cudaError_t forbidden_by_capture() {
    std::lock_guard guard(machine().lock);
    if (thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
    bool own = own_capture && own_capture->capture->mode != cudaStreamCaptureModeRelaxed;
    if (!own && !(global_captures && thread_mode == cudaStreamCaptureModeGlobal)) return cudaSuccess;
    if (own) own_capture->capture->invalid = true;
    return cudaErrorStreamCaptureUnsupported;
}

}  // namespace fakecuda

extern "C" {

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
    std::lock_guard guard(machine().lock);
    Stream& stream = machine().stream(handle);
    bool is_default = handle == nullptr || handle == cudaStreamLegacy;
    if (settings().capture_fails || is_default || stream.capture) return fail(cudaErrorStreamCaptureUnsupported);
    auto graph = std::make_shared<Graph>();
    graph->id = next_graph++;
    stream.capture.reset(new Capture{graph, mode});
    own_capture = &stream;
    global_captures += mode == cudaStreamCaptureModeGlobal;
    return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
    std::lock_guard guard(machine().lock);
    Stream& stream = machine().stream(handle);
    *graph = nullptr;
    if (!stream.capture) return fail(cudaErrorIllegalState);
    std::unique_ptr<Capture> capture = std::move(stream.capture);
    own_capture = nullptr;
    global_captures -= capture->mode == cudaStreamCaptureModeGlobal;
    if (capture->invalid) return fail(cudaErrorStreamCaptureInvalidated);
    *graph = reinterpret_cast<cudaGraph_t>(new Handle(capture->graph));
    return cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
    return cudaStreamGetCaptureInfo(handle, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* count) {
    std::lock_guard guard(machine().lock);
    const Capture* capture = machine().stream(handle).capture.get();
    *status = !capture ? cudaStreamCaptureStatusNone
                       : (capture->invalid ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive);
    if (!capture) return cudaSuccess;
    if (id) *id = capture->graph->id;
    if (graph) *graph = nullptr;
    if (nodes) *nodes = nullptr;
    if (edges) *edges = nullptr;
    if (count) *count = 0;
    return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
    std::swap(*mode, thread_mode);
    return cudaSuccess;
}

// A node that calls `function` at each launch of the graph; without a capture it is called now.
cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
    {
        std::lock_guard guard(machine().lock);
        if (add_node(machine().stream(handle), 0, [=] { function(data); })) return cudaSuccess;
    }
    function(data);
    return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
    *count = graph_of(graph)->nodes.size();
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
    *executable = reinterpret_cast<cudaGraphExec_t>(new Handle(graph_of(graph)));
    return cudaSuccess;
}

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long flags) {
    return cudaGraphInstantiate(executable, graph, flags);
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
    if (machine().failed()) return fail(cudaErrorIllegalAddress);
    Stream* stream;
    {
        std::lock_guard guard(machine().lock);
        machine().touch(current_device());
        machine().counters.graph_launches++;
        stream = &machine().stream(handle);
    }
    for (const Graph::Node& node : graph_of(executable)->nodes) {
        if (!machine().run(node, *stream)) return fail(cudaErrorIllegalAddress);
        if (node.effect) node.effect();  // not under the lock: an effect may wait for Python's
    }
    return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
    delete &graph_of(graph);
    return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t executable) {
    delete &graph_of(executable);
    return cudaSuccess;
}

}  // extern "C"
