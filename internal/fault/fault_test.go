package fault

import (
	"errors"
	"fmt"
	"io"
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
	if As(Conflict, nil) != nil || Is(nil, Internal) || Of(io.EOF) != Internal {
		t.Fatal("nil or plain errors are treated wrongly")
	}
}
