package dockerapi

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/api/types/volume"

	"github.com/cloudos-io/cloudos/api"
)

// leased is a backend that has one object of each kind with a label.
type leased struct {
	Containers
	Networks
	Volumes
	removed chan string
}

func (l *leased) ContainerList(_ context.Context, o ListOptions) ([]container.Summary, error) {
	if !o.All || !o.Filters["label"][api.LabelLease+"=lease-1234"] {
		return nil, nil
	}
	return []container.Summary{{ID: "c"}}, nil
}

func (l *leased) ContainerRemove(_ context.Context, name string, force, volumes, _ bool) error {
	if force && volumes {
		l.removed <- name
	}
	return nil
}

func (l *leased) NetworkList(context.Context, Filters) ([]network.Summary, error) {
	return []network.Summary{{Network: network.Network{ID: "n"}}}, nil
}

func (l *leased) NetworkRemove(_ context.Context, name string) error {
	l.removed <- name
	return nil
}

func (l *leased) VolumeList(context.Context, Filters) (volume.ListResponse, error) {
	return volume.ListResponse{Volumes: []volume.Volume{{Name: "v"}}}, nil
}

func (l *leased) VolumeRemove(_ context.Context, name string, _ bool) error {
	l.removed <- name
	return nil
}

func TestReap(t *testing.T) {
	b := &leased{removed: make(chan string, 9)}
	a := leaseAPI{b, b, b, slog.Default(), time.Millisecond, &leases{n: map[string]int{}}}
	a.reap(t.Context(), "lease-1234")
	for _, want := range []string{"c", "n", "v"} {
		if got := <-b.removed; got != want {
			t.Errorf("removed %q, want %q", got, want)
		}
	}
}

func TestLeasesAreCounted(t *testing.T) {
	l := &leases{n: map[string]int{}}
	l.change("a", 1)
	l.change("a", 1)
	if l.change("a", -1) != 1 || l.change("a", 0) != 1 || l.change("a", -1) != 0 || len(l.n) != 0 {
		t.Errorf("got %v", l.n)
	}
}
