package fault_test

import (
	"context"
	"errors"
	"os"
	"syscall"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func TestOutwait(t *testing.T) {
	other := errors.New("other")
	emfile := fault.New(fault.Conflict, "cannot: %w", &os.PathError{Op: "open", Path: "x", Err: syscall.EMFILE})
	for name, c := range map[string]struct {
		errs  []error // of each try
		want  error
		tries int
	}{
		"well":           {[]error{nil}, nil, 1},
		"another reason": {[]error{other}, other, 1},
		"short once":     {[]error{emfile, nil}, nil, 2},
		"short twice":    {[]error{emfile, syscall.ENFILE, nil}, nil, 3},
		"then another":   {[]error{emfile, other}, other, 2},
	} {
		tries := 0
		if err := fault.Outwait(t.Context(), func() error { tries++; return c.errs[tries-1] }); err != c.want || tries != c.tries {
			t.Errorf("%s: %v after %d tries, want %v after %d", name, err, tries, c.want, c.tries)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	tries := 0
	if err := fault.Outwait(ctx, func() error { tries++; return emfile }); err != emfile || tries > 2 {
		t.Errorf("called off: %v after %d tries", err, tries)
	}
}
