#define KD_VECTOR_BYTES 16
#define KD_ENTRY kd_rows_portable
#define KD_COLUMNS_ENTRY kd_columns_portable
#include "rows.inl"
