package volume

import (
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func TestParseBind(t *testing.T) {
	for spec, want := range map[string]Point{
		"/data":            {Type: mount.TypeVolume, Target: "/data"},
		"vol:/data":        {Type: mount.TypeVolume, Name: "vol", Target: "/data"},
		"vol:/data:ro":     {Type: mount.TypeVolume, Name: "vol", Target: "/data", Mode: "ro", ReadOnly: true},
		"vol:/data:nocopy": {Type: mount.TypeVolume, Name: "vol", Target: "/data", Mode: "nocopy", NoCopy: true},
		"/src/../a:/b/./c": {Type: mount.TypeBind, Source: "/a", Target: "/b/c", Propagation: "rprivate", CreateSource: true},
		"/a:/b:ro,rshared,z": {Type: mount.TypeBind, Source: "/a", Target: "/b", Mode: "ro,rshared,z", ReadOnly: true,
			Propagation: "rshared", Relabel: "z", CreateSource: true},
		"/a:/b:U,idmap,bind": {Type: mount.TypeBind, Source: "/a", Target: "/b", Mode: "U,idmap,bind", Chown: true, IDMap: true,
			NonRecursive: true, Propagation: "rprivate", CreateSource: true},
	} {
		got, err := ParseBind(spec, "")
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %v\nwant %+v", spec, got, err, want)
		}
	}
	for spec, want := range map[string]string{
		"":                "invalid volume specification: ''",
		":/b":             "invalid volume specification: ':/b'",
		"/a:/b:ro:x":      "invalid volume specification",
		"/a:/":            "destination can't be '/'",
		"/a:/..":          "destination can't be '/'",
		"/a:rel":          "mount path must be absolute",
		"/a:ro":           "invalid volume specification: '/a:ro'",
		"/a:/b:ro,rw":     "invalid mode: ro,rw",
		"/a:/b:z,Z":       "invalid mode",
		"/a:/b:bogus":     "invalid mode: bogus",
		"/a:/b:nocopy":    "nocopy is for volumes",
		"v1:/b:rshared":   "propagation is for bind mounts",
		"./rel/path:/b":   "includes invalid characters for a local volume name",
		"v:/b":            "volume name is too short",
		"/a:/b\x00/c":     "NUL",
		"../../etc:/b:ro": "includes invalid characters",
	} {
		_, err := ParseBind(spec, "")
		if !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: got %v, want %q", spec, err, want)
		}
	}
}

func TestFromMount(t *testing.T) {
	got, err := FromMount(mount.Mount{Type: mount.TypeTmpfs, Target: "/t/", TmpfsOptions: &mount.TmpfsOptions{SizeBytes: 4096, Mode: os.FileMode(0o1770), Options: [][]string{{"exec"}}}})
	want := Point{Type: mount.TypeTmpfs, Target: "/t", Options: []string{"mode=1770", "size=4096", "exec"}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v %v", got, err)
	}
	for name, c := range map[string]struct {
		m    mount.Mount
		want string
	}{
		"no target":       {mount.Mount{Type: "bind", Source: "/a"}, `invalid mount config for type "bind": field Target must not be empty`},
		"foreign options": {mount.Mount{Type: "bind", Source: "/a", Target: "/b", VolumeOptions: &mount.VolumeOptions{}}, "field VolumeOptions must not be specified"},
		"tmpfs source":    {mount.Mount{Type: "tmpfs", Source: "/a", Target: "/b"}, "field Source must not be specified"},
		"relative source": {mount.Mount{Type: "bind", Source: "a", Target: "/b"}, "mount path must be absolute"},
		"unknown type":    {mount.Mount{Type: "nfs", Target: "/b"}, "mount type unknown"},
		"subpath out":     {mount.Mount{Type: "volume", Source: "vol", Target: "/b", VolumeOptions: &mount.VolumeOptions{Subpath: "../x"}}, "subpath must be a relative path"},
		"propagation":     {mount.Mount{Type: "bind", Source: "/a", Target: "/b", BindOptions: &mount.BindOptions{Propagation: "up"}}, "invalid propagation mode: up"},
		"tmpfs option":    {mount.Mount{Type: "tmpfs", Target: "/b", TmpfsOptions: &mount.TmpfsOptions{Options: [][]string{{"suid"}}}}, "invalid option: suid"},
	} {
		_, err := FromMount(c.m)
		if !fault.Is(err, fault.Invalid) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}

func TestResolvePrecedence(t *testing.T) {
	from := func(name string) ([]Point, error) {
		if name != "other" {
			return nil, fault.New(fault.NotFound, "no such container: %s", name)
		}
		return []Point{
			{Type: mount.TypeVolume, Name: "shared", Target: "/shared"},
			{Type: mount.TypeVolume, Name: "old", Target: "/data"},
			{Type: mount.TypeTmpfs, Target: "/scratch"},
		}, nil
	}
	cfg := &container.Config{Volumes: map[string]struct{}{"/data": {}, "/anon": {}, "/tmpfs/": {}}}
	hc := &container.HostConfig{
		VolumesFrom: []string{"other:ro"},
		Binds:       []string{"named:/data"},
		Mounts:      []mount.Mount{{Type: "bind", Source: "/src", Target: "/bind"}},
		Tmpfs:       map[string]string{"/tmpfs": "size=1m"},
	}
	got, err := Resolve(cfg, hc, from)
	if err != nil {
		t.Fatal(err)
	}
	want := []Point{
		{Type: mount.TypeVolume, Name: "shared", Target: "/shared", ReadOnly: true, Inherited: true, NoCopy: true},
		{Type: mount.TypeVolume, Name: "named", Target: "/data"},
		{Type: mount.TypeBind, Source: "/src", Target: "/bind", Propagation: "rprivate"},
		{Type: mount.TypeTmpfs, Target: "/tmpfs", Options: []string{"size=1m"}},
		{Type: mount.TypeVolume, Target: "/anon", FromImage: true},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	for name, hc := range map[string]*container.HostConfig{
		"binds":      {Binds: []string{"/a:/x", "/b:/x/"}},
		"bind mount": {Binds: []string{"/a:/x"}, Mounts: []mount.Mount{{Type: "tmpfs", Target: "/x"}}},
		"bind tmpfs": {Binds: []string{"/a:/x"}, Tmpfs: map[string]string{"/x": ""}},
	} {
		if _, err := Resolve(&container.Config{}, hc, from); !fault.Is(err, fault.Invalid) || err.Error() != "Duplicate mount point: /x" {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := Resolve(&container.Config{}, &container.HostConfig{VolumesFrom: []string{"none"}}, from); !fault.Is(err, fault.NotFound) {
		t.Errorf("unknown container: %v", err)
	}
}

func FuzzParseBind(f *testing.F) {
	for _, s := range []string{"/a:/b:ro", "v1:/b", "/b", "a:b:c:d"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		p, err := ParseBind(s, "")
		if err != nil {
			return
		}
		if p.Target == "/" || !strings.HasPrefix(p.Target, "/") || strings.Contains(p.Target+"/", "/../") {
			t.Fatalf("%q gives target %q", s, p.Target)
		}
		if p.Type == mount.TypeVolume && p.Name != "" && validName(p.Name) != nil {
			t.Fatalf("%q gives name %q", s, p.Name)
		}
	})
}
