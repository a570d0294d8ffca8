// The table of functions that each level fills: what the kernels are called and what they take.
//
// Pointers are to contiguous memory of the dtype that is given, or of the type that is written; a null pointer stands
// for a tensor that is absent. Sizes are in elements. Python checks every argument before a pointer is taken.
#pragma once

#include <cstdint>

namespace ff {

enum class DType : int { float32, bfloat16, float16 };
enum class Activation : int { gelu, gelu_tanh, quick_gelu };

// A map (batch, T, H, W) cut into windows, sizes by axis; a map in 2-D has T = 1. Windows are no longer than the map;
// `full_window` is what was asked for, which bias tables are made for.
struct WindowGeometry {
  int64_t batch, size[3], window[3], full_window[3], shift[3], cyclic[3], heads, head_dim, mask_pads;
};

// What attention adds to its scores and fills its pads with; all float32, null where absent. At most one of table
// (offsets, heads) and bias (heads, N, N) is there. With logit_scale (heads,) attention goes by cosines times e^it.
struct WindowExtras {
  const float *table, *bias, *logit_scale, *qkv_bias;
};
// Their gradients, null where not wanted.
struct WindowExtrasGradients {
  float *table, *bias, *logit_scale, *qkv_bias;
};

struct Kernels {
  // out (batch, T, H, W, heads * head_dim) from qkv (..., 3 * heads * head_dim).
  void (*window_attention_fwd)(int threads, DType dtype, WindowGeometry geometry, float scale, const void* qkv,
                               WindowExtras extras, void* out);
  // d_qkv, and the gradients of the extras, from that of out.
  void (*window_attention_bwd)(int threads, DType dtype, WindowGeometry geometry, float scale, const void* grad_out,
                               const void* qkv, WindowExtras extras, void* d_qkv, WindowExtrasGradients gradients);
  // out = activation(hidden + bias), hidden and out (rows, columns), possibly the same memory; bias (columns,).
  void (*bias_activation_fwd)(int threads, DType dtype, Activation activation, int64_t rows, int64_t columns,
                              const void* hidden, const void* bias, void* out);
  // d_hidden = grad_out * activation'(hidden + bias), beside it `out` again, and d_bias (columns,), float32.
  void (*bias_activation_bwd)(int threads, DType dtype, Activation activation, int64_t rows, int64_t columns,
                              const void* grad_out, const void* hidden, const void* bias, void* d_hidden, void* out,
                              float* d_bias);

  // A tile of logits (rows, cols), whose first column is number first_col of all. The positives of row i are columns
  // [begin[i], end[i]) of all. Adds the tile to maxima and sums of exp(logit - maximum) of rows and of columns, and to
  // the sums of positives; all float32.
  void (*contrastive_loss_fwd)(int threads, int64_t rows, int64_t cols, int64_t first_col, const float* logits,
                               const int64_t* begin, const int64_t* end, float* row_top, float* row_sum,
                               float* col_top, float* col_sum, float* positive);
  // grad = exp(logit - row_lse) d_row + exp(logit - col_lse) d_col + d_positive at the positives, of a dtype; float32
  // may overwrite the logits. Adds sum_j grad_ij logit_ij to grad_by_logit (rows,).
  void (*contrastive_loss_bwd)(int threads, DType dtype, int64_t rows, int64_t cols, int64_t first_col,
                               const float* logits, const int64_t* begin, const int64_t* end, const float* row_lse,
                               const float* d_row, const float* col_lse, const float* d_col, const float* d_positive,
                               void* grad, float* grad_by_logit);
  // A tile as above, to whose logits `bias` is still to be added. Adds sum_j log(1 + exp(-z_ij (logit_ij + bias))) to
  // loss (rows,), where z is 1 at positives and -1 elsewhere.
  void (*sigmoid_loss_fwd)(int threads, int64_t rows, int64_t cols, int64_t first_col, float bias, const float* logits,
                           const int64_t* begin, const int64_t* end, float* loss);
  // grad = d_loss times its derivative, of a dtype; float32 may overwrite the logits. Adds sums over columns, of grad
  // to grad_sum and of grad times logit (without bias) to grad_by_logit, both (rows,).
  void (*sigmoid_loss_bwd)(int threads, DType dtype, int64_t rows, int64_t cols, int64_t first_col, float bias,
                           const float* logits, const int64_t* begin, const int64_t* end, const float* d_loss,
                           void* grad, float* grad_sum, float* grad_by_logit);
  // columns (B, P, K, C): a map (B, H, W, C) sampled where offset (B, G, K, 2, P) says, times mask (B, G, K, P).
  // geometry is B H W C G, then kernel, stride, padding, dilation and the size of the result as pairs (y, x).
  void (*deform_conv2d_fwd)(int threads, DType dtype, const int64_t* geometry, const void* input, const float* offset,
                            const float* mask, void* columns);
  // The gradients of offset and mask, and the columns again.
  void (*deform_conv2d_bwd)(int threads, DType dtype, const int64_t* geometry, const void* d_columns,
                            const void* input, const float* offset, const float* mask, float* d_offset, float* d_mask,
                            void* columns);
  // The gradient of the map, for which the map is not needed.
  void (*deform_conv2d_input_bwd)(int threads, DType dtype, const int64_t* geometry, const void* d_columns,
                                  const float* offset, const float* mask, float* d_input);
  // Which of the boxes (count, 4) are kept, sorted by class and then from the best: the class of i ends at end[i].
  void (*nms)(int threads, int64_t count, const float* boxes, const int64_t* end, float threshold, bool* kept);
  // total = residual + residual_scale * x in the dtype to which both promote, one factor for `rows_of_sample` rows, and
  // norm = LayerNorm(total) in the same; without a residual norm = LayerNorm(x) alone. mean and rstd (rows,).
  void (*layer_norm_fwd)(int threads, DType x_dtype, DType residual_dtype, int64_t rows, int64_t columns,
                         int64_t rows_of_sample, const void* x, const void* residual, const float* residual_scale,
                         const float* weight, const float* bias, float eps, void* total, void* norm, float* mean,
                         float* rstd);
  // d_sum in residual_dtype and dx = residual_scale * d_sum in x_dtype, either of them or none; d_weights (2, columns)
  // of weight and bias or null. grad_norm, grad_sum (or null) and total are in the promoted dtype.
  void (*layer_norm_bwd)(int threads, DType x_dtype, DType residual_dtype, int64_t rows, int64_t columns,
                         int64_t rows_of_sample, const void* grad_norm, const void* grad_sum, const void* total,
                         const float* residual_scale, const float* weight, const float* mean, const float* rstd,
                         void* d_sum, void* dx, float* d_weights);
  // norm (rows, 4 C) = LayerNorm of four neighbours of the map x (B, H, W, C) side by side, for `rows` merged tokens
  // from `first` on, or null for the statistics alone; mean and rstd (rows,).
  void (*patch_merging_norm_fwd)(int threads, DType dtype, int64_t first, int64_t rows, int64_t height, int64_t width,
                                 int64_t channels, const void* x, const float* weight, const float* bias, float eps,
                                 void* norm, float* mean, float* rstd);
  // From grad (rows, 4 C), the gradient of norm: dx, of which the neighbours of these tokens are written, or null, and
  // d_weights (2, 4 C) of weight and bias, or null.
  void (*patch_merging_norm_bwd)(int threads, DType dtype, int64_t first, int64_t rows, int64_t height, int64_t width,
                                 int64_t channels, const void* grad, const void* x, const float* weight,
                                 const float* mean, const float* rstd, void* dx, float* d_weights);
  // out = x / max(length, eps) for rows of x, and their lengths; then dx from grad_out.
  void (*l2_normalize_fwd)(int threads, DType dtype, int64_t rows, int64_t columns, const void* x, float eps, void* out,
                           float* length);
  void (*l2_normalize_bwd)(int threads, DType dtype, int64_t rows, int64_t columns, const void* grad_out, const void* x,
                           const float* length, float eps, void* dx);
  // c (M, N) = a (M, K) b (K, N) + bias (N,) or null, float32. a and b of any strides, rows of c in one piece.
  void (*matmul)(int threads, int64_t M, int64_t N, int64_t K, const float* a, int64_t a_row_stride,
                 int64_t a_column_stride, const float* b, int64_t b_row_stride, int64_t b_column_stride,
                 const float* bias, float* c, int64_t c_row_stride);
};

// Every member of Kernels by name: a level defines a function of each, and Python sees it.
#define FF_KERNELS(EACH) \
  EACH(window_attention_fwd) \
  EACH(window_attention_bwd) \
  EACH(bias_activation_fwd) \
  EACH(bias_activation_bwd) \
  EACH(contrastive_loss_fwd) \
  EACH(contrastive_loss_bwd) \
  EACH(sigmoid_loss_fwd) \
  EACH(sigmoid_loss_bwd) \
  EACH(deform_conv2d_fwd) \
  EACH(deform_conv2d_bwd) \
  EACH(deform_conv2d_input_bwd) \
  EACH(nms) \
  EACH(layer_norm_fwd) \
  EACH(layer_norm_bwd) \
  EACH(patch_merging_norm_fwd) \
  EACH(patch_merging_norm_bwd) \
  EACH(l2_normalize_fwd) \
  EACH(l2_normalize_bwd) \
  EACH(matmul)

}  // namespace ff
