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

func TestStatus(t *testing.T) {
	for k, want := range map[Kind]int{
		Internal: 500, Invalid: 400, Unauthorized: 401, Forbidden: 403, NotFound: 404, NotModified: 304, Conflict: 409, Gone: 410,
		Unsupported: 501, Unavailable: 503, DeadlineExceeded: 504, NotAcceptable: 406,
	} {
		if k.Status() != want || FromStatus(want) != k {
			t.Errorf("kind %d is %d, and %d is kind %d", k, k.Status(), want, FromStatus(want))
		}
	}
	if Exhausted.Status() != 503 || (NotAcceptable+1).Status() != 500 || FromStatus(418) != Internal || FromStatus(0) != Internal {
		t.Error("wrong at the edges")
	}
}
