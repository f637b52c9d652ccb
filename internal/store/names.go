package store

import (
	"sync"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Names maps names to the ids that own them. A name is reserved before its
// owner is stored, so that two creations cannot both succeed; the stored
// records are what it is rebuilt from.
type Names struct {
	mu sync.RWMutex
	m  map[string]string
}

// NewNames makes an empty index.
func NewNames() *Names { return &Names{m: map[string]string{}} }

// Reserve gives name to id, or fails with fault.Conflict telling the owner.
// Reserving what id owns already succeeds.
func (n *Names) Reserve(name, id string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if owner, taken := n.m[name]; taken && owner != id {
		return fault.New(fault.Conflict, "Conflict. The container name \"/%s\" is already in use by container %q. You have to remove (or rename) that container to be able to reuse that name.", name, owner)
	}
	n.m[name] = id
	return nil
}

// Release gives a name back if id owns it.
func (n *Names) Release(name, id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.m[name] == id {
		delete(n.m, name)
	}
}

// Lookup tells who owns a name.
func (n *Names) Lookup(name string) (id string, ok bool) {
	n.mu.RLock()
	defer n.mu.RUnlock()
	id, ok = n.m[name]
	return id, ok
}
