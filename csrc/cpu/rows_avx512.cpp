#define KD_VECTOR_BYTES 64
#define KD_ENTRY kd_rows_avx512
#define KD_COLUMNS_ENTRY kd_columns_avx512
#include "rows.inl"
