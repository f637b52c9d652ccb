package criapi

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"
	v1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/cloudos-io/cloudos/internal/container"
	"github.com/cloudos-io/cloudos/internal/fault"
)

func TestSignals(t *testing.T) {
	for s, want := range map[v1.Signal]string{
		v1.Signal_SIGNAL_SIGTERM: "SIGTERM", v1.Signal_SIGNAL_SIGRTMIN: "SIGRTMIN", v1.Signal_SIGNAL_SIGRTMINPLUS15: "SIGRTMIN+15", v1.Signal_SIGNAL_SIGRTMAXMINUS2: "SIGRTMAX-2",
	} {
		if got := signalName(s); got != want {
			t.Errorf("%s: %s", s, got)
		}
	}
}

func TestCodes(t *testing.T) {
	for k, want := range map[fault.Kind]codes.Code{
		fault.NotFound: codes.NotFound, fault.Invalid: codes.InvalidArgument, fault.Conflict: codes.FailedPrecondition, fault.Unsupported: codes.Unimplemented,
		fault.Exhausted: codes.ResourceExhausted, fault.Internal: codes.Unknown, fault.DeadlineExceeded: codes.DeadlineExceeded,
	} {
		if got := code(k); got != want {
			t.Errorf("%d: %s, want %s", k, got, want)
		}
	}
}

func TestUserNS(t *testing.T) {
	m := func(c, h, l uint32) []*v1.IDMapping {
		return []*v1.IDMapping{{ContainerId: c, HostId: h, Length: l}}
	}
	for name, c := range map[string]struct {
		o    *v1.UserNamespace
		want container.UserNS
		ok   bool
	}{
		"nil":          {nil, container.UserNS{}, true},
		"host":         {&v1.UserNamespace{Mode: v1.NamespaceMode_NODE}, container.UserNS{}, true},
		"host mapped":  {&v1.UserNamespace{Mode: v1.NamespaceMode_NODE, Uids: m(0, 1, 1)}, container.UserNS{}, false},
		"pod":          {&v1.UserNamespace{Uids: m(0, 65536, 65536), Gids: m(0, 65536, 65536)}, container.UserNS{Host: 65536, Size: 65536}, true},
		"differing":    {&v1.UserNamespace{Uids: m(0, 65536, 65536), Gids: m(0, 65537, 65536)}, container.UserNS{}, false},
		"groups alone": {&v1.UserNamespace{Gids: m(0, 65536, 65536)}, container.UserNS{}, false},
		"target":       {&v1.UserNamespace{Mode: v1.NamespaceMode_TARGET}, container.UserNS{}, false},
	} {
		got, err := userNS(c.o)
		if got != c.want || (err == nil) != c.ok {
			t.Errorf("%s: %v, %v", name, got, err)
		}
	}
}

func TestPullAuth(t *testing.T) {
	for name, c := range map[string]struct {
		in         *v1.AuthConfig
		host       string
		user, pass string
		none, bad  bool
	}{
		"nil":         {nil, "r.example", "", "", true, false},
		"user":        {&v1.AuthConfig{Username: "u", Password: "p"}, "r.example", "u", "p", false, false},
		"encoded":     {&v1.AuthConfig{Auth: "dTpwOnE="}, "r.example", "u", "p:q", false, false},
		"not encoded": {&v1.AuthConfig{Auth: "u:p"}, "r.example", "", "", false, true},
		"no colon":    {&v1.AuthConfig{Auth: "dQ=="}, "r.example", "", "", false, true},
		"same host":   {&v1.AuthConfig{Username: "u", Password: "p", ServerAddress: "https://r.example/v1/"}, "r.example", "u", "p", false, false},
		"other host":  {&v1.AuthConfig{Username: "u", Password: "p", ServerAddress: "https://evil.example"}, "r.example", "", "", true, false},
		"hub":         {&v1.AuthConfig{Username: "u", Password: "p", ServerAddress: "https://index.docker.io/v1/"}, "docker.io", "u", "p", false, false},
		"empty":       {&v1.AuthConfig{}, "r.example", "", "", true, false},
	} {
		got, err := pullAuth(c.in, c.host)
		if (err != nil) != c.bad || err == nil && (got == nil) != c.none || got != nil && (got.Username != c.user || got.Password != c.pass) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
}

func TestRates(t *testing.T) {
	r := rates{m: map[string]reading{}}
	at := time.Unix(1000, 0)
	if _, ok := r.of("a", at, 100); ok {
		t.Error("a rate of one reading")
	}
	if _, ok := r.of("a", at.Add(100*time.Millisecond), 200); ok {
		t.Error("a rate of no time")
	}
	if v, ok := r.of("a", at.Add(2*time.Second), 100+2e9); !ok || v != 1e9 {
		t.Errorf("%d, %v", v, ok)
	}
	if v, ok := r.of("a", at.Add(2100*time.Millisecond), 9e9); !ok || v != 1e9 {
		t.Errorf("the last rate is %d, %v", v, ok)
	}
	if v, ok := r.of("a", at.Add(10*time.Second), 5); !ok || v != 0 { // the counter began anew
		t.Errorf("%d, %v", v, ok)
	}
	r.keep(func(string) bool { return false })
	if len(r.m) != 0 {
		t.Error("not forgotten")
	}
}

func TestCapped(t *testing.T) {
	var c capped
	for range 20 {
		if n, err := c.Write(make([]byte, 1<<20)); n != 1<<20 || err != nil {
			t.Fatal(n, err)
		}
	}
	if c.Len() != maxOutput {
		t.Error(c.Len())
	}
}

func TestNames(t *testing.T) {
	got := fullNames([]string{"busybox:1", "r.example:5000/a/b@sha256:" + strings.Repeat("0", 64), "!"})
	want := []string{"docker.io/library/busybox:1", "r.example:5000/a/b@sha256:" + strings.Repeat("0", 64), "!"}
	if !slices.Equal(got, want) {
		t.Error(got)
	}
}

// FuzzTranslate decodes what a hostile client could send.
func FuzzTranslate(f *testing.F) {
	for _, c := range []*v1.ContainerConfig{
		{},
		{Metadata: &v1.ContainerMetadata{Name: "a"}, Image: &v1.ImageSpec{Image: "i"}, Mounts: []*v1.Mount{{ContainerPath: "/x", HostPath: "/y"}, {Image: &v1.ImageSpec{Image: "z"}, Readonly: true, ContainerPath: "a"}},
			Linux: &v1.LinuxContainerConfig{Resources: &v1.LinuxContainerResources{Unified: map[string]string{"memory.high": "1"}, HugepageLimits: []*v1.HugepageLimit{{PageSize: "2MB"}}},
				SecurityContext: &v1.LinuxContainerSecurityContext{RunAsUser: &v1.Int64Value{Value: 5}, Apparmor: &v1.SecurityProfile{ProfileType: v1.SecurityProfile_Localhost, LocalhostRef: "localhost/x"}}}},
	} {
		b, _ := proto.Marshal(c)
		f.Add(b)
	}
	pods := []*container.Pod{{Name: "p", PID: container.NamespaceContainer}, {Name: "p", PID: container.NamespacePod, UserNS: container.UserNS{Host: 1000, Size: 1000}}}
	f.Fuzz(func(t *testing.T, b []byte) {
		c := new(v1.ContainerConfig)
		if proto.Unmarshal(b, c) != nil {
			return
		}
		for _, p := range pods {
			out, err := translate(p, c)
			if err != nil {
				continue
			}
			for _, m := range out.HostConfig.Mounts {
				if !strings.HasPrefix(m.Target, "/") || strings.Contains(m.Target, "/../") {
					t.Errorf("target %q", m.Target)
				}
			}
			if out.HostConfig.Privileged != c.GetLinux().GetSecurityContext().GetPrivileged() {
				t.Error("privileged")
			}
		}
		conf := new(v1.PodSandboxConfig)
		if proto.Unmarshal(b, conf) == nil {
			_, _ = pod(conf, "")
		}
	})
}
