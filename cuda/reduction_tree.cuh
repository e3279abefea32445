// The reduction tree over the partial sums of a class of several chunks. A node is the sum of up to
// fan_in neighboring nodes one level below; the leaves are the chunks. The last block to arrive at a
// node adds it up, all its threads together; at the root it moves the center. By then every chunk
// has read it. A node's sum takes the place of its first child's, a row of the pool.

#ifndef TF_CENTER_LOSS_OP_CUDA_REDUCTION_TREE_CUH_
#define TF_CENTER_LOSS_OP_CUDA_REDUCTION_TREE_CUH_

#include <cstdint>

#include "cuda/device.cuh"
#include "cuda/workspace.cuh"

namespace tcl {
namespace {

// A node that a warp of the block brings.
struct Node {
  int64_t label = 0;
  int chunks = 0;          // of the class; 0: no node
  int first_pool_row = 0;  // of the class
  int chunk = 0;           // the first one below this node
  int finite = 0;          // samples in its sum
  bool complete = false;   // whether this block arrived last at its parent
};

template <typename Feature, int Width, typename Step>
class ReductionTree {
 public:
  using Center = CenterType<Feature>;

  __device__ ReductionTree(const Parameters<Feature>& p, Step& step, unsigned char* shared)
      : p_(p), step_(step), nodes_(reinterpret_cast<Node*>(shared)) {}

  static __host__ __device__ int64_t SharedBytes(int threads) {
    return threads / kWarp * static_cast<int64_t>(sizeof(Node));
  }

  // By all threads of the block. Each warp brings a chunk whose sum it has stored, or no node.
  __device__ void Reduce(const Node& own) {
    const int warps = static_cast<int>(blockDim.x) / kWarp;
    const int thread = static_cast<int>(threadIdx.x);
    const int fan_in = p_.tuning.fan_in;
    if (Lane() == 0) nodes_[WarpOfBlock()] = own;
    int level = 0;
#pragma unroll 1
    for (int width = 1;; width *= fan_in, ++level) {  // chunks below a node
      __syncthreads();  // the nodes and their sums are there
      if (thread < warps) nodes_[thread].complete = Arrive(nodes_[thread], level, width);
      __syncthreads();  // orders the arrivals before what follows
      bool any = false;
#pragma unroll 1
      for (int k = 0; k < warps; ++k) {
        if (!nodes_[k].complete) continue;
        any = true;
        AddUp(nodes_[k], width);
      }
      if (!any) return;
      __syncthreads();  // all threads have read the nodes
      Climb(&nodes_[WarpOfBlock()], width);
    }
  }

 private:
  __device__ int Parent(const Node& node, int width) const {
    return node.chunk / (width * p_.tuning.fan_in) * (width * p_.tuning.fan_in);
  }
  __device__ int Children(const Node& node, int width) const {
    return min((node.chunks - Parent(node, width) + width - 1) / width, p_.tuning.fan_in);
  }
  __device__ bool ParentIsRoot(const Node& node, int width) const {
    return width * p_.tuning.fan_in >= node.chunks;
  }

  // Whether this block is the last one at the node's parent.
  __device__ bool Arrive(const Node& node, int level, int width) const {
    if (node.chunks == 0) return false;
    p_.finite_count[node.first_pool_row + node.chunk] = node.finite;
    int* const counter =
        p_.arrivals + level * p_.pool_rows + node.first_pool_row + Parent(node, width);
    if (CountArrival(counter) != Children(node, width) - 1) return false;
    *counter = 0;
    return true;
  }

  // The finite samples below the node's parent; by a warp.
  __device__ int Finite(const Node& node, int width) const {
    const int* const first = p_.finite_count + node.first_pool_row + Parent(node, width);
    return WarpSum(Lane() < Children(node, width) ? __ldcg(first + Lane() * width) : 0);
  }

  // The sum of the parent's children, into its row or, at the root, into the center.
  __device__ void AddUp(const Node& node, int width) {
    constexpr int kLoads = sizeof(Center) == 8 ? 8 : 16;  // in flight
    const int row = node.first_pool_row + Parent(node, width), count = Children(node, width);
    const bool is_root = ParentIsRoot(node, width);
    const int finite = is_root ? Finite(node, width) : 0;
#pragma unroll 1
    for (int64_t at = int64_t{threadIdx.x} * Width; at < p_.dim; at += blockDim.x * Width) {
      Center sum[Width] = {};
#pragma unroll 1
      for (int k = 0; k < count; k += kLoads) {
        Center rows[kLoads][Width];
#pragma unroll
        for (int s = 0; s < kLoads; ++s) {  // beyond the last the last again: without a condition
          const Center* const from = p_.PoolRow(row + min(k + s, count - 1) * width);
          LoadVector<Width, Cache::kShared>(from + at, rows[s]);
        }
#pragma unroll
        for (int s = 0; s < kLoads; ++s) {
#pragma unroll
          for (int e = 0; e < Width; ++e) sum[e] += k + s < count ? rows[s][e] : Center{0};
        }
      }
      if (is_root) {
        if (finite > 0) step_.MoveCenter(node.label, at, step_.Scale(finite), sum);
      } else {
        StoreVector<Width, Cache::kNormal>(p_.PoolRow(row) + at, sum);
      }
    }
  }

  // The node becomes its parent, or none where another block completes that or nothing is left; by a
  // warp.
  __device__ void Climb(Node* node, int width) const {
    const bool goes_on = node->complete && !ParentIsRoot(*node, width);
    const int finite = goes_on ? Finite(*node, width) : 0;
    const int parent = Parent(*node, width);
    __syncwarp();
    if (Lane() != 0) return;
    if (!goes_on) node->chunks = 0;
    node->finite = finite;
    node->chunk = parent;
  }

  const Parameters<Feature>& p_;
  Step& step_;
  Node* nodes_;  // one for each warp, in shared memory
};

}  // namespace
}  // namespace tcl

#endif  // TF_CENTER_LOSS_OP_CUDA_REDUCTION_TREE_CUH_
