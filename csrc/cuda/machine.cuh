// What the kernels run on: a GPU, or whatever KD_DEVICE_HEADER puts in its place.
#pragma once
#ifndef KD_DEVICE_HEADER
#define KD_DEVICE_HEADER "device.cuh"
#endif
#include KD_DEVICE_HEADER
