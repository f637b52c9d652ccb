package volume

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/moby/moby/api/types/volume"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/plugin"
)

// Volumes of plugins. A plugin is asked for what only it knows; the record beside
// our own volumes holds what it does not: labels, and that we have used it.

const (
	kind = "VolumeDriver"

	// Attaching a disk of a cloud takes its time; looking something up does not.
	changeLimit = 2 * time.Minute
	askLimit    = 10 * time.Second

	maxListed = 10000 // volumes of one plugin that are shown
	usesMark  = "boot"
)

// remoteVolume is a volume as plugins describe it.
type remoteVolume struct {
	Name       string
	Mountpoint string
	CreatedAt  string
	Status     map[string]any
}

func (s *Store) find(ctx context.Context, driver string) (*plugin.Plugin, error) {
	if s.plugins == nil {
		return nil, fault.New(fault.NotFound, "error looking up volume plugin %s: plugin %q not found", driver, driver)
	}
	p, err := s.plugins.Find(ctx, kind, driver)
	if err != nil {
		return nil, fault.New(fault.Of(err), "error looking up volume plugin %s: %w", driver, err)
	}
	return p, nil
}

// Drivers names the drivers there are.
func (s *Store) Drivers(ctx context.Context) []string {
	out := []string{Driver}
	if s.plugins != nil {
		out = append(out, s.plugins.Names(ctx, kind)...)
	}
	return out
}

func (s *Store) call(ctx context.Context, driver, method string, limit time.Duration, in, out any) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	p, err := s.find(ctx, driver)
	if err != nil {
		return err
	}
	return p.Call(ctx, kind+"."+method, in, out)
}

type named struct{ Name string }

// mounting asks for, or ends, one use.
type mounting struct{ Name, ID string }

func (s *Store) createRemote(ctx context.Context, r *stored) error {
	in := struct {
		Name string
		Opts map[string]string `json:",omitempty"`
	}{r.Name, r.Options}
	if err := s.call(ctx, r.Driver, "Create", changeLimit, in, nil); err != nil {
		return fault.New(refusal(err, fault.Invalid), "create %s: %w", r.Name, err)
	}
	return nil
}

// refusal is the kind of an error: k where the plugin itself said no.
func refusal(err error, k fault.Kind) fault.Kind {
	var r *plugin.Refused
	if errors.As(err, &r) {
		return k
	}
	return fault.Of(err)
}

// removeRemote removes a plugin's volume. With force one whose plugin is gone is
// forgotten.
func (s *Store) removeRemote(ctx context.Context, r stored, force bool) error {
	err := s.call(ctx, r.Driver, "Remove", changeLimit, named{r.Name}, nil)
	if err == nil {
		return nil
	}
	if force && fault.Is(err, fault.NotFound) {
		return nil
	}
	// It may be gone behind our back: then the record goes too.
	if _, gerr := s.getRemote(ctx, r.Driver, r.Name); fault.Is(gerr, fault.NotFound) && refusal(err, fault.Conflict) == fault.Conflict {
		return nil
	}
	return fault.New(refusal(err, fault.Conflict), "%w", err)
}

// getRemote asks for a volume; fault.NotFound if the plugin says that it has none.
func (s *Store) getRemote(ctx context.Context, driver, name string) (remoteVolume, error) {
	var out struct{ Volume *remoteVolume }
	if err := s.call(ctx, driver, "Get", askLimit, named{name}, &out); err != nil {
		if refusal(err, fault.NotFound) == fault.NotFound {
			return remoteVolume{}, fault.New(fault.NotFound, "get %s: no such volume: %w", name, err)
		}
		return remoteVolume{}, err
	}
	if out.Volume == nil || out.Volume.Name != name {
		return remoteVolume{}, fault.New(fault.NotFound, "get %s: no such volume", name)
	}
	return *out.Volume, nil
}

func (s *Store) scope(ctx context.Context, driver string) string {
	var out struct{ Capabilities struct{ Scope string } }
	if s.call(ctx, driver, "Capabilities", askLimit, nil, &out) == nil && out.Capabilities.Scope == "global" {
		return "global"
	}
	return "local"
}

func (s *Store) inspectRemote(ctx context.Context, r stored, d *volume.Volume) error {
	g, err := s.getRemote(ctx, r.Driver, r.Name)
	if err != nil {
		return err
	}
	d.Mountpoint, d.Scope, d.Status = g.Mountpoint, s.scope(ctx, r.Driver), g.Status
	if t, err := time.Parse(time.RFC3339, g.CreatedAt); err == nil {
		d.CreatedAt = t.Format(time.RFC3339)
	}
	return nil
}

// listRemote asks every plugin for its volumes.
func (s *Store) listRemote(ctx context.Context) (map[string]volume.Volume, []string) {
	if s.plugins == nil || !s.plugins.Any() {
		return nil, nil
	}
	all := map[string]volume.Volume{}
	var warnings []string
	for _, driver := range s.plugins.Names(ctx, kind) {
		var out struct{ Volumes []*remoteVolume }
		if err := s.call(ctx, driver, "List", askLimit, nil, &out); err != nil {
			warnings = append(warnings, fmt.Sprintf("the volumes of plugin %s are not known: %v", driver, err))
			continue
		}
		scope := s.scope(ctx, driver)
		for i, v := range out.Volumes {
			if i >= maxListed {
				warnings = append(warnings, fmt.Sprintf("plugin %s has more than %d volumes: the others are not shown", driver, maxListed))
				break
			}
			if v == nil || validName(v.Name) != nil {
				continue // what cannot be named cannot be used
			}
			if _, twice := all[v.Name]; twice {
				continue
			}
			all[v.Name] = volume.Volume{Name: v.Name, Driver: driver, Scope: scope, Mountpoint: v.Mountpoint, CreatedAt: v.CreatedAt}
		}
	}
	return all, warnings
}

// foreign tells whether a volume is a plugin's.
func (s *Store) foreign(name string) bool {
	v, err := s.get(name)
	return err == nil && v.rec.Driver != ""
}

// adopt looks for a volume that we do not know among the plugins' and makes a
// record of it. That nobody has it is no error.
func (s *Store) adopt(ctx context.Context, name string) error {
	s.mu.Lock()
	_, known := s.m[name]
	s.mu.Unlock()
	if known || s.plugins == nil || validName(name) != nil || !s.plugins.Any() {
		return nil
	}
	for _, driver := range s.plugins.Names(ctx, kind) {
		if _, err := s.getRemote(ctx, driver, name); err != nil {
			continue
		}
		v := newVol(stored{Name: name, Created: time.Now().UTC(), Driver: driver}, creating)
		if had, err := s.claim(ctx, v, "", false); err != nil || had != nil {
			return err
		}
		err := s.make(v.rec)
		s.mu.Lock()
		if err != nil {
			delete(s.m, name)
		} else {
			v.state = present
		}
		close(v.settled)
		s.mu.Unlock()
		if err != nil {
			return err
		}
		return s.Sync()
	}
	return nil
}

// Uses of plugins' volumes. A plugin counts mounts by the ids that we give it, so
// an engine that takes over from a killed one must know which it has to end: each
// use is a file DIR/VOLUME/CONTAINER below the run root, there before the plugin
// is asked and gone after.

// loadUses reads the uses that an earlier engine noted in this boot.
func (s *Store) loadUses(runRoot, boot string) error {
	if s.plugins == nil || runRoot == "" {
		return nil
	}
	s.runs = filepath.Join(runRoot, "volumes")
	fail := func(err error) error {
		return fault.New(fault.Internal, "cannot read the uses of volumes: %w", err)
	}
	if err := os.MkdirAll(s.runs, 0o700); err != nil {
		return fail(err)
	}
	mark := filepath.Join(s.runs, "."+usesMark)
	if b, err := os.ReadFile(mark); err != nil || string(b) != boot {
		// Mounts do not outlive a boot.
		if err := os.RemoveAll(s.runs); err != nil {
			return fail(err)
		}
		if err := os.MkdirAll(s.runs, 0o700); err != nil {
			return fail(err)
		}
		if err := os.WriteFile(mark, []byte(boot), 0o600); err != nil {
			return fail(err)
		}
		return nil
	}
	dirs, err := os.ReadDir(s.runs)
	if err != nil {
		return fail(err)
	}
	for _, d := range dirs {
		v := s.m[d.Name()]
		if v == nil || v.rec.Driver == "" {
			continue
		}
		ids, err := os.ReadDir(filepath.Join(s.runs, d.Name()))
		if err != nil {
			return fail(err)
		}
		for _, id := range ids {
			if v.left == nil {
				v.left = map[string]bool{}
			}
			v.left[id.Name()] = true
		}
	}
	return nil
}

func (s *Store) usePath(name, id string) string { return filepath.Join(s.runs, name, id) }

// useRemote asks the plugin to mount; v.mu is held. Asking again for the same use
// is what plugins are made for: an engine that was restarted learns the path so.
func (s *Store) useRemote(ctx context.Context, v *vol, id string) (string, error) {
	if v.uses[id] && v.at != "" {
		return v.at, nil
	}
	if id != filepath.Base(id) || id == "." || id == ".." {
		return "", fault.New(fault.Internal, "cannot note the use of volume %s by %q", v.rec.Name, id)
	}
	name := v.rec.Name
	if err := os.MkdirAll(filepath.Dir(s.usePath(name, id)), 0o700); err != nil {
		return "", fault.New(fault.Internal, "cannot note the use of volume %s: %w", name, err)
	}
	if err := os.WriteFile(s.usePath(name, id), nil, 0o600); err != nil {
		return "", fault.New(fault.Internal, "cannot note the use of volume %s: %w", name, err)
	}
	var out struct{ Mountpoint string }
	err := s.call(ctx, v.rec.Driver, "Mount", changeLimit, mounting{name, id}, &out)
	if err == nil && out.Mountpoint == "" {
		err = s.call(ctx, v.rec.Driver, "Path", askLimit, named{name}, &out)
	}
	if err == nil {
		var f *os.File
		if f, err = openMountpoint(name, out.Mountpoint); err == nil {
			f.Close()
			v.uses[id], v.at = true, out.Mountpoint
			delete(v.left, id)
			return v.at, nil
		}
	}
	// It may have been mounted all the same.
	v.uses[id] = true
	_ = s.releaseRemote(context.WithoutCancel(ctx), v, id)
	return "", fault.New(refusal(err, fault.Internal), "error while mounting volume '%s': %w", name, err)
}

// releaseRemote ends a use; v.mu is held. If the plugin cannot be asked the use
// stays noted for the next engine.
func (s *Store) releaseRemote(ctx context.Context, v *vol, id string) error {
	delete(v.uses, id)
	err := s.call(ctx, v.rec.Driver, "Unmount", changeLimit, mounting{v.rec.Name, id}, nil)
	if len(v.uses) == 0 {
		v.at = ""
	}
	var said *plugin.Refused
	if err == nil || errors.As(err, &said) && said.Status != http.StatusNotFound {
		_ = os.Remove(s.usePath(v.rec.Name, id))
		_ = os.Remove(filepath.Dir(s.usePath(v.rec.Name, id))) // the last one's
		delete(v.left, id)
	} else {
		if v.left == nil {
			v.left = map[string]bool{}
		}
		v.left[id] = true
	}
	if err != nil {
		return fault.New(fault.Of(err), "cannot unmount volume %s: %w", v.rec.Name, err)
	}
	return nil
}

// dropLeft ends the uses that nobody has any more; v.mu is held.
func (s *Store) dropLeft(ctx context.Context, v *vol) {
	for id := range v.left {
		if v.uses[id] {
			delete(v.left, id)
			continue
		}
		if err := s.releaseRemote(ctx, v, id); err != nil {
			s.log.Warn("cannot end the use of a plugin's volume, it is tried again later", "volume", v.rec.Name, "container", id, "cause", err)
		}
	}
}

// openMountpoint opens what a plugin says to have mounted. A system directory of
// the host is no volume, whatever the plugin says.
func openMountpoint(name, at string) (*os.File, error) {
	if !filepath.IsAbs(at) || filepath.Clean(at) != at || len(at) > unix.PathMax || slices.Contains(protected, at) {
		return nil, fault.New(fault.Unavailable, "the plugin mounted volume %s at %.200q, which cannot be used: it must be the plain absolute path of a directory of its own", name, at)
	}
	f, err := os.OpenFile(at, unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fault.New(fault.Unavailable, "cannot open where the plugin mounted volume %s: %w", name, err)
	}
	if real, err := os.Readlink(self(int(f.Fd()))); err != nil || slices.Contains(protected, real) {
		f.Close()
		return nil, fault.New(fault.Unavailable, "the plugin mounted volume %s at %s, a directory of the host's system", name, at)
	}
	return f, nil
}
