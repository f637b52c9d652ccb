package dockerapi

import (
	"context"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/pattern"
)

// leaseGrace is how long a client that was cut off has to come back.
const leaseGrace = 10 * time.Second

// reapLimit bounds the removal of what a lease leaves.
const reapLimit = 2 * time.Minute

var leaseID = pattern.New(`^[A-Za-z0-9_.-]{8,64}$`)

// leaseAPI serves leases: what is labelled with one lives as long as somebody
// holds it by an open request. Tests use it, so that nothing of theirs outlives
// them however they end.
type leaseAPI struct {
	containers Containers
	networks   Networks
	volumes    Volumes
	log        *slog.Logger
	grace      time.Duration
	held       *leases
}

// leases counts who holds what.
type leases struct {
	mu sync.Mutex
	n  map[string]int
}

func (l *leases) change(id string, by int) (left int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.n[id] += by
	left = l.n[id]
	if left == 0 {
		delete(l.n, id)
	}
	return left
}

// hold is POST /servin/lease: the answer begins at once and ends with the lease.
func (a leaseAPI) hold(w *response, r *request) error {
	id := r.URL.Query().Get("id")
	if !leaseID.MatchString(id) {
		return fault.New(fault.Invalid, "cannot hold lease %q: an id has 8 to 64 letters, digits, points, dashes and underscores", id)
	}
	a.held.change(id, 1)
	s := newStream(w, "application/json", 0)
	defer s.end()
	err := s.send([]byte("{}\n"))
	if err == nil {
		<-r.Context().Done()
	}
	a.held.change(id, -1)
	leaving := context.Background()
	if srv, ok := r.Context().Value(http.ServerContextKey).(*http.Server); ok && srv.BaseContext != nil {
		leaving = srv.BaseContext(nil)
	}
	t := time.NewTimer(a.grace)
	defer t.Stop()
	select {
	case <-t.C:
	case <-leaving.Done():
		return nil // containers outlive the engine: the client asks the next one
	}
	if a.held.change(id, 0) > 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), reapLimit)
	defer cancel()
	a.reap(ctx, id)
	return nil
}

// reap removes what has the label of a lease.
func (a leaseAPI) reap(ctx context.Context, id string) {
	f := Filters{"label": {api.LabelLease + "=" + id: true}}
	warn := func(kind, name string, err error) {
		if err != nil && !fault.Is(err, fault.NotFound) {
			a.log.Warn("cannot remove what a lease leaves", "kind", kind, "name", name, "cause", err)
		}
	}
	list, err := a.containers.ContainerList(ctx, ListOptions{All: true, Filters: f})
	warn("containers", "", err)
	for _, c := range list {
		warn("container", c.ID, a.containers.ContainerRemove(ctx, c.ID, true, true, false))
	}
	nets, err := a.networks.NetworkList(ctx, f)
	warn("networks", "", err)
	for _, n := range nets {
		warn("network", n.Name, a.networks.NetworkRemove(ctx, n.ID))
	}
	vols, err := a.volumes.VolumeList(ctx, f)
	warn("volumes", "", err)
	for _, v := range vols.Volumes {
		warn("volume", v.Name, a.volumes.VolumeRemove(ctx, v.Name, true))
	}
}
