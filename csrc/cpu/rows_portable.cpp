#define KD_VECTOR_BYTES 16
#define KD_ENTRY kd_rows_portable
#include "rows.inl"
