#define KD_VECTOR_BYTES 32
#define KD_ENTRY kd_rows_avx2
#define KD_COLUMNS_ENTRY kd_columns_avx2
#include "rows.inl"
