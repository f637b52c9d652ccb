package engine

import (
	"fmt"
	"os"
	"strings"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/oci"
	"github.com/cloudos-io/cloudos/internal/runtime"
)

// join opens the namespaces of the containers that this one shares some with.
func (e *Engine) join(r *container.Record, in *oci.Input, back *scope) error {
	hc := r.HostConfig
	open := func(name, kind string) (*unit, string, error) {
		o, err := e.lookup(name)
		if err != nil {
			return nil, "", err
		}
		t := o.running()
		if t == nil && kind != "net" {
			// The kind and the words are Docker's.
			return nil, "", fault.New(fault.Internal, "failed to join %s namespace: container %s is not running", strings.ToUpper(kind), name)
		}
		if t == nil {
			return nil, "", fault.New(fault.Conflict, "cannot join %s namespace of a non running container: container %s is %s", kind, o.rec.Load().Name, o.rec.Load().State.Status)
		}
		f, err := openNamespace(t, kind)
		if err != nil {
			return nil, "", err
		}
		back.hold(f)
		return o, fdPath(f), nil
	}
	if m := hc.NetworkMode; m.IsContainer() {
		o, p, err := open(m.ConnectedContainer(), "net")
		if err != nil {
			return err
		}
		in.Join.Network = p
		if err := e.joinUser(o, in, back); err != nil {
			return err
		}
	}
	if m := hc.IpcMode; m.IsContainer() {
		o, p, err := open(m.Container(), "ipc")
		if err != nil {
			return err
		}
		or := o.rec.Load()
		if !or.HostConfig.IpcMode.IsShareable() {
			return fault.New(fault.Invalid, "cannot join IPC of container %s: non-shareable IPC (hint: use IpcMode:shareable for the donor container)", or.Name)
		}
		in.Join.IPC, in.ShmSource = p, e.hostDir(o)+"/shm"
		if err := e.joinUser(o, in, back); err != nil {
			return err
		}
	}
	if m := hc.PidMode; m.IsContainer() {
		o, p, err := open(m.Container(), "pid")
		if err != nil {
			return err
		}
		in.Join.PID = p
		if err := e.joinUser(o, in, back); err != nil {
			return err
		}
	}
	return nil
}

// joinUser joins the user namespace that owns the namespaces joined.
func (e *Engine) joinUser(o *unit, in *oci.Input, back *scope) error {
	if in.Join.User != "" || o.rec.Load().UserNS.Size == 0 {
		return nil
	}
	t := o.running()
	if t == nil {
		return fault.New(fault.Conflict, "cannot join user namespace of a non running container: %s", o.id)
	}
	f, err := openNamespace(t, "user")
	if err != nil {
		return err
	}
	back.hold(f)
	in.Join.User = fdPath(f)
	// Its user namespace owns what it made: procfs and sysfs are then made anew.
	// The host's would be bound otherwise, and show the host's processes.
	hc := o.rec.Load().HostConfig
	in.Join.Owned = !hc.PidMode.IsHost() && !hc.NetworkMode.IsHost() && !hc.IpcMode.IsHost()
	return nil
}

// openNamespace opens a namespace of the task's process. The pid may have been
// given to somebody else only after the task ended.
func openNamespace(t runtime.Task, kind string) (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", t.Pid(), kind))
	if err != nil {
		return nil, fault.New(fault.Conflict, "cannot join %s namespace: %w", kind, err)
	}
	select {
	case <-t.Exited():
		f.Close()
		return nil, fault.New(fault.Conflict, "cannot join %s namespace: container %s has ended", kind, t.ID())
	default:
		return f, nil
	}
}

// fdPath names a descriptor so that other processes of ours can open it too.
func fdPath(f *os.File) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()) }
