// The Python module distaff.kernels._native: handlers() maps FFI target names to capsules, features() names the
// instruction sets that the kernels will use on this processor.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "cpu.h"
#include "registry.h"
#include "timing.h"

namespace {

PyObject* list_handlers(PyObject*, PyObject*) {
  PyObject* all = PyDict_New();
  if (all == nullptr) return nullptr;
  for (const auto& [name, handler] : distaff::handlers()) {
    PyObject* capsule = PyCapsule_New(reinterpret_cast<void*>(handler), nullptr, nullptr);
    if (capsule == nullptr || PyDict_SetItemString(all, name.c_str(), capsule) != 0) {
      Py_XDECREF(capsule);
      Py_DECREF(all);
      return nullptr;
    }
    Py_DECREF(capsule);
  }
  return all;
}

PyObject* list_features(PyObject*, PyObject*) {
  PyObject* names = PyList_New(0);
  if (names == nullptr) return nullptr;
  for (const char* name : distaff::cpu_feature_names()) {
    PyObject* text = PyUnicode_FromString(name);
    if (text == nullptr || PyList_Append(names, text) != 0) {
      Py_XDECREF(text);
      Py_DECREF(names);
      return nullptr;
    }
    Py_DECREF(text);
  }
  return names;
}

PyObject* list_timings(PyObject*, PyObject*) {
  PyObject* all = PyDict_New();
  if (all == nullptr) return nullptr;
  for (const distaff::Timer* timer : distaff::Timer::all()) {
    PyObject* row = Py_BuildValue("(Ld)", static_cast<long long>(timer->calls.load()), timer->nanoseconds.load() * 1e-9);
    if (row == nullptr || PyDict_SetItemString(all, timer->name.c_str(), row) != 0) {
      Py_XDECREF(row);
      Py_DECREF(all);
      return nullptr;
    }
    Py_DECREF(row);
  }
  return all;
}

PyMethodDef methods[] = {
    {"handlers", list_handlers, METH_NOARGS, "FFI target names and their capsules."},
    {"features", list_features, METH_NOARGS, "Instruction sets that the kernels use on this processor."},
    {"timings", list_timings, METH_NOARGS, "Calls and seconds of each kernel since the module was loaded."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Native CPU kernels of distaff.", -1, methods,
                          nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() { return PyModule_Create(&definition); }
