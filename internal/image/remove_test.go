package image

import (
	"bytes"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// TestRemoveTogether removes and tags from several sides at once: one of them
// removes, the others are told that there is no such image, and what was tagged is whole.
func TestRemoveTogether(t *testing.T) {
	s := newService(t, t.TempDir())
	for round := range 15 {
		l := layerTar(t, file{name: "f", body: fmt.Sprint(round)})
		if _, err := s.Load(t.Context(), bytes.NewReader(dockerTar(t, configFor(t, nil, l), []string{"gone:1"}, l)), nil, nil); err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		var removed, tagged atomic.Int32
		for range 3 {
			wg.Go(func() {
				if _, err := s.Remove(t.Context(), "gone:1", RemoveOptions{Force: true}); err == nil {
					removed.Add(1)
				} else if !fault.Is(err, fault.NotFound) {
					t.Errorf("remove: %v", err)
				}
			})
		}
		wg.Go(func() {
			if err := s.Tag(t.Context(), "gone:1", "kept:1"); err == nil {
				tagged.Add(1)
			} else if !fault.Is(err, fault.NotFound) {
				t.Errorf("tag: %v", err)
			}
		})
		wg.Wait()
		if removed.Load() != 1 {
			t.Fatalf("%d of three removed it", removed.Load())
		}
		if tagged.Load() == 1 {
			if _, err := s.Inspect(t.Context(), "kept:1", "", false); err != nil {
				t.Fatalf("what was tagged: %v", err)
			}
			if _, err := s.Remove(t.Context(), "kept:1", RemoveOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
}
