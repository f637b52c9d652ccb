package fault

import (
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"
)

func TestKinds(t *testing.T) {
	e := New(NotFound, "no such container: %s: %w", "x", io.EOF)
	if !Is(e, NotFound) || !errors.Is(e, io.EOF) || e.Error() != "no such container: x: EOF" {
		t.Fatalf("got %v of kind %d", e, Of(e))
	}
	if !Is(fmt.Errorf("cannot start: %w", e), NotFound) {
		t.Fatal("wrapping lost the kind")
	}
	if Of(As(Conflict, e)) != Conflict {
		t.Fatal("the outermost kind should win")
	}
	if full := fmt.Errorf("cannot write: %w", &os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}); Of(full) != Exhausted || Of(As(Internal, full)) != Exhausted {
		t.Fatal("a full disk is no fault of ours")
	}
	if As(Conflict, nil) != nil || Is(nil, Internal) || Of(io.EOF) != Internal {
		t.Fatal("nil or plain errors are treated wrongly")
	}
}

func TestExitCode(t *testing.T) {
	e := WithExitCode(127, New(Invalid, "no such command: %w", io.EOF))
	if !Is(e, Invalid) || !errors.Is(e, io.EOF) || e.Error() != "no such command: EOF" {
		t.Fatalf("the code hid the error: %v", e)
	}
	if ExitCode(fmt.Errorf("cannot run: %w", As(Conflict, e))) != 127 || ExitCode(io.EOF) != 125 || WithExitCode(1, nil) != nil {
		t.Fatal("wrong codes")
	}
}
