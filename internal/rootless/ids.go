package rootless

import (
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/idmap"
	"github.com/cloudos-io/cloudos/internal/snapshot"
)

// mappings tells which ids the user namespace gets: the user as root, then the
// user's subordinate ids from 1 on. Without those only root can be mapped.
func mappings(warn func(string)) snapshot.IDMap {
	uid, gid := uint32(os.Getuid()), uint32(os.Getgid())
	name := strconv.Itoa(int(uid))
	if u, err := user.LookupId(name); err == nil {
		name = u.Username
	}
	m, err := idmap.Subordinate(idmap.Config{}, name, uid, gid)
	if err == nil {
		for _, tool := range []string{"newuidmap", "newgidmap"} {
			if _, lerr := exec.LookPath(tool); lerr != nil {
				err = fault.New(fault.Unsupported, "cannot map subordinate ids: %s is not installed (Debian package: uidmap)", tool)
			}
		}
	}
	if err != nil {
		warn(fmt.Sprintf("only root exists in containers, and images with other users will not unpack: %v", err))
		return snapshot.IDMap{UIDs: []snapshot.IDRange{{Host: uid, Size: 1}}, GIDs: []snapshot.IDRange{{Host: gid, Size: 1}}}
	}
	return m
}

// mapIDs writes the maps of a process in a new user namespace: alone for one id
// each, else with the set-uid programs that check subordinate ids.
func mapIDs(pid int, m snapshot.IDMap) error {
	if len(m.UIDs) == 1 && len(m.GIDs) == 1 {
		dir := fmt.Sprintf("/proc/%d/", pid)
		// The kernel wants setgroups given up before an unprivileged gid map.
		if err := os.WriteFile(dir+"setgroups", []byte("deny"), 0); err != nil {
			return fmt.Errorf("cannot map ids: %w", err)
		}
		for file, r := range map[string]snapshot.IDRange{"uid_map": m.UIDs[0], "gid_map": m.GIDs[0]} {
			if err := os.WriteFile(dir+file, fmt.Appendf(nil, "%d %d %d\n", r.Container, r.Host, r.Size), 0); err != nil {
				return fmt.Errorf("cannot map ids: %w", err)
			}
		}
		return nil
	}
	for tool, ranges := range map[string][]snapshot.IDRange{"newuidmap": m.UIDs, "newgidmap": m.GIDs} {
		args := []string{strconv.Itoa(pid)}
		for _, r := range ranges {
			for _, n := range []uint32{r.Container, r.Host, r.Size} {
				args = append(args, strconv.FormatUint(uint64(n), 10))
			}
		}
		if out, err := exec.Command(tool, args...).CombinedOutput(); err != nil {
			return fault.New(fault.Unsupported, "cannot map subordinate ids: %s: %w: %s", tool, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}
