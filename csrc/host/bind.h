// What the data pipeline calls: functions that are compiled once, for the plainest processor.
#pragma once

#include <pybind11/pybind11.h>

void bind_host(pybind11::module_& module);
