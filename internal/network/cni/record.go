package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/durable"
	"github.com/cloudos-io/cloudos/internal/fault"
)

// recordVersion is what this build writes and the newest it reads.
const recordVersion = 1

// state of an attachment.
type state string

const (
	adding   state = "adding" // plugins run
	added    state = "added"
	removing state = "removing" // to be undone
)

// record is an attachment on disk: everything that undoing takes, so that a
// configuration that has changed or gone does not matter.
//
// It has two files. The first, NAME.json, is on the disk before an attachment is
// acknowledged. The second, NAME.result, says that ADD was done and with what
// result; it need not survive a power cut, after which everything is undone.
type record struct {
	Version      int                        `json:"version"`
	Owner        Owner                      `json:"owner"`
	ContainerID  string                     `json:"containerId"`
	IfName       string                     `json:"ifName"`
	NetNS        string                     `json:"netns"`
	Network      string                     `json:"networkName"`
	CNIVersion   string                     `json:"cniVersion"`
	DisableCheck bool                       `json:"disableCheck,omitempty"`
	Plugins      []json.RawMessage          `json:"plugins"`
	Args         [][2]string                `json:"cniArgs,omitempty"`
	Capabilities map[string]json.RawMessage `json:"capabilityArgs,omitempty"`

	// Result is the last plugin's, in the version of the configuration.
	Result json.RawMessage `json:"-"`
	State  state           `json:"-"`
	// Of this engine alone: attempts to undo, the first, and the next.
	tries       int
	since, next time.Time
}

func newRecord(q Request, l *list) (*record, error) {
	caps, err := q.Capabilities.args()
	if err != nil {
		return nil, err
	}
	for k, v := range q.Extra {
		if !json.Valid(v) {
			return nil, fault.New(fault.Invalid, "cannot pass the capability %q on: %q is no JSON", k, v)
		}
		caps[k] = v
	}
	r := &record{
		Version: recordVersion, State: adding, Owner: q.Owner, ContainerID: q.ContainerID, IfName: q.IfName, NetNS: q.NetNS,
		Network: l.Name, CNIVersion: l.CNIVersion, DisableCheck: l.DisableCheck, Args: q.Args, Capabilities: caps,
	}
	for _, p := range l.Plugins {
		r.Plugins = append(r.Plugins, p.Bytes)
	}
	return r, nil
}

// plugins are the chain of a record.
func (r *record) plugins() ([]*libcni.PluginConfig, error) {
	out := make([]*libcni.PluginConfig, len(r.Plugins))
	for i, b := range r.Plugins {
		p, err := libcni.NetworkPluginConfFromBytes(b)
		if err != nil {
			return nil, err
		}
		out[i] = p
	}
	return out, nil
}

// netns is the path to give to plugins: none when the namespace is gone, as
// after a reboot, where DEL is to do what it can without.
func (r *record) netns() string {
	var st unix.Statfs_t
	if err := unix.Statfs(r.NetNS, &st); err != nil || st.Type != unix.NSFS_MAGIC {
		return ""
	}
	return r.NetNS
}

// disk keeps one file for each attachment.
type disk struct{ dir string }

func newDisk(root string) (disk, error) {
	d := disk{filepath.Join(root, "attachments")}
	if err := os.MkdirAll(d.dir, 0o700); err != nil {
		return d, fmt.Errorf("cannot make the directory of CNI records: %w", err)
	}
	return d, nil
}

// base is the name of a record's files. Neither part has a slash or an @, and
// an id does not begin with a dot.
func (r *record) base() string { return r.ContainerID + "@" + r.IfName }

// write puts the first file where it belongs; sync makes that last.
func (d disk) write(r *record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("cannot encode a CNI record: %w", err)
	}
	return d.replace(r.base()+".json", b)
}

func (d disk) writeResult(r *record) error { return d.replace(r.base()+".result", r.Result) }

func (d disk) replace(name string, b []byte) error {
	if err := durable.WriteFile(filepath.Join(d.dir, name), b, 0o600, durable.Nothing); err != nil {
		return fmt.Errorf("cannot write a CNI record: %w", err)
	}
	return nil
}

func (d disk) sync(r *record) error {
	for _, p := range []string{filepath.Join(d.dir, r.base()+".json"), d.dir} {
		f, err := os.Open(p)
		if err != nil {
			return fmt.Errorf("cannot sync a CNI record: %w", err)
		}
		err = f.Sync()
		f.Close()
		if err != nil {
			return fmt.Errorf("cannot sync a CNI record: %w", err)
		}
	}
	return nil
}

// drop removes a record's files, the one that makes it a record last.
func (d disk) drop(r *record) error {
	var errs error
	for _, ext := range []string{".result", ".lock", ".json"} {
		if err := os.Remove(filepath.Join(d.dir, r.base()+ext)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = errors.Join(errs, fmt.Errorf("cannot remove a CNI record: %w", err))
		}
	}
	return errs
}

// lease opens the file that the plugins of an attachment inherit, locked. It is
// locked as long as any of them, or what they have started, runs: those that a
// killed engine left are waited for, at most until ctx ends.
func (d disk) lease(ctx context.Context, r *record) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(d.dir, r.base()+".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot lock a CNI record: %w", err)
	}
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return f, nil // unlocked: whoever hangs there must not stop teardown
		}
	}
}

// load reads every record. Those that cannot be read are named and left alone.
func (d disk) load() (out []*record, bad []error) {
	es, err := os.ReadDir(d.dir)
	if err != nil {
		return nil, []error{fmt.Errorf("cannot list CNI records: %w", err)}
	}
	for _, e := range es {
		name, ext := e.Name(), filepath.Ext(e.Name())
		p := filepath.Join(d.dir, name)
		switch {
		case strings.HasPrefix(name, "."):
			os.Remove(p) // a write that never finished
			continue
		case ext == ".result" || ext == ".lock":
			if _, err := os.Lstat(strings.TrimSuffix(p, ext) + ".json"); errors.Is(err, fs.ErrNotExist) {
				os.Remove(p) // the rest of a removal
			}
			continue
		case ext != ".json":
			continue
		}
		r, err := d.read(p)
		if err != nil {
			bad = append(bad, fmt.Errorf("cannot read %s: %w", name, err))
			continue
		}
		out = append(out, r)
	}
	return out, bad
}

func (d disk) read(path string) (*record, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	r, err := decodeRecord(b)
	if err != nil {
		return nil, err
	}
	if r.base()+".json" != filepath.Base(path) {
		return nil, errors.New("it is about another attachment")
	}
	r.State = removing
	if r.Result, err = os.ReadFile(strings.TrimSuffix(path, ".json") + ".result"); err == nil {
		r.State = added
	}
	return r, nil
}

func decodeRecord(b []byte) (*record, error) {
	r := new(record)
	if err := json.Unmarshal(b, r); err != nil {
		return nil, err
	}
	switch {
	case r.Version < 1 || r.Version > recordVersion:
		return nil, fmt.Errorf("it has version %d, which this engine does not know", r.Version)
	case len(r.ContainerID) > 128 || !containerID.MatchString(r.ContainerID) || r.IfName == "" || strings.ContainsAny(r.IfName, "/@") || len(r.Plugins) == 0:
		return nil, errors.New("it does not name its attachment")
	}
	if _, err := r.plugins(); err != nil {
		return nil, err
	}
	return r, nil
}
