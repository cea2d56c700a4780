"""LLVM IR that calls compiled functions one after another."""

import ctypes


class Call(ctypes.Structure):
    """A call of a function of the other programs; it runs on `work_items` threads."""

    _fields_ = [
        ("function", ctypes.c_int64),
        ("arguments", ctypes.c_int64),
        ("work_items", ctypes.c_int64),
    ]


class CallArguments(ctypes.Structure):
    """Arguments of `run`."""

    _fields_ = [
        ("calls", ctypes.c_int64),  # of Call, dense
        ("end", ctypes.c_int64),  # of the calls
        ("parallel", ctypes.c_int64),  # GOMP_parallel
    ]


# As text: llvmlite's builder calls no function that it only knows by its address. The first field
# of all arguments counts the shares of the work that threads have taken.
CALL_PROGRAM = """
%call = type { ptr, ptr, i64 }

define void @run(ptr %given) {
begin:
  %first = load ptr, ptr %given
  %end.place = getelementptr ptr, ptr %given, i64 1
  %end = load ptr, ptr %end.place
  %parallel.place = getelementptr ptr, ptr %given, i64 2
  %parallel = load ptr, ptr %parallel.place
  br label %next
next:
  %call = phi ptr [ %first, %begin ], [ %following, %done ]
  %function = load ptr, ptr %call
  %arguments.place = getelementptr %call, ptr %call, i64 0, i32 1
  %arguments = load ptr, ptr %arguments.place
  %items.place = getelementptr %call, ptr %call, i64 0, i32 2
  %items = load i64, ptr %items.place
  store i64 0, ptr %arguments
  %alone = icmp eq i64 %items, 1
  br i1 %alone, label %here, label %together
here:
  call void %function(ptr %arguments)
  br label %done
together:
  %threads = trunc i64 %items to i32
  call void %parallel(ptr %function, ptr %arguments, i32 %threads, i32 0)
  br label %done
done:
  %following = getelementptr %call, ptr %call, i64 1
  %more = icmp ult ptr %following, %end
  br i1 %more, label %next, label %finish
finish:
  ret void
}
"""
