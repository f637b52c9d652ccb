package native

import (
	"context"
	"fmt"

	"github.com/cloudos-io/cloudos/internal/fault"
	contract "github.com/cloudos-io/cloudos/internal/runtime"
)

// ExecToken implements runtime.ExecKeeper.
func (t *task) ExecToken(e contract.Exec) string {
	x, ok := e.(*exec)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%d %d %d", x.cookie, x.pid, startTime(x.pid))
}

// RestoreExec implements runtime.ExecKeeper. The monitor tells the end of an exec
// to whoever is connected, under the number that the former daemon gave it.
func (t *task) RestoreExec(_ context.Context, id, token string) (contract.Exec, error) {
	x := &exec{id: id, t: t, exited: make(chan struct{})}
	var start uint64
	if n, err := fmt.Sscanf(token, "%d %d %d", &x.cookie, &x.pid, &start); n != 3 || err != nil {
		return nil, fault.New(fault.Invalid, "cannot take an exec over: %q is no name of one", token)
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if e, ended := t.early[x.cookie]; ended {
		delete(t.early, x.cookie)
		x.end(exitOf(e))
		return x, nil
	}
	if t.over || x.pid <= 1 || start == 0 || startTime(x.pid) != start {
		return nil, fault.New(fault.NotFound, "exec %s has ended", id)
	}
	t.execs[x.cookie] = x
	return x, nil
}
