package image

import (
	"maps"
	"reflect"
	"slices"
	"testing"
	"time"

	dockerspec "github.com/moby/docker-image-spec/specs-go/v1"

	"github.com/cloudos-io/cloudos/internal/fault"
)

func TestChange(t *testing.T) {
	env := []string{"A=1"}
	c := new(dockerspec.DockerOCIImageConfig)
	c.Env, c.WorkingDir = env, "/w"
	err := change(c, []string{
		`ENV A=2 B="two words"`, "ENV OLD form here", `CMD ["x","y"]`, "ENTRYPOINT run it", "EXPOSE 80 81-82/udp", "WORKDIR sub\nUSER me:us",
		`LABEL k=v "q q"='r'`, `VOLUME ["/a", "/b"]`, "STOPSIGNAL SIGQUIT", "ONBUILD RUN x", `HEALTHCHECK --interval=5s --retries=2 CMD curl x`, `SHELL ["/bin/bash"]`,
	})
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(c.Env, []string{"A=2", "B=two words", "OLD=form here"}) || !reflect.DeepEqual(c.Cmd, []string{"x", "y"}) ||
		!reflect.DeepEqual(c.Entrypoint, []string{"/bin/sh", "-c", "run it"}) || c.WorkingDir != "/w/sub" || c.User != "me:us" ||
		c.Labels["k"] != "v" || c.Labels["q q"] != "r" || len(c.Volumes) != 2 || c.StopSignal != "SIGQUIT" || len(c.OnBuild) != 1 ||
		c.Healthcheck.Interval != 5*time.Second || c.Healthcheck.Retries != 2 || c.Healthcheck.Test[0] != "CMD-SHELL" || c.Shell[0] != "/bin/bash" {
		t.Errorf("got %+v", c)
	}
	if got := slices.Sorted(maps.Keys(c.ExposedPorts)); !slices.Equal(got, []string{"80/tcp", "81/udp", "82/udp"}) {
		t.Errorf("ports %v", got)
	}
	if env[0] != "A=1" {
		t.Error("what others share was changed")
	}
	for _, bad := range []string{"RUN x", "ENV", "ENV a=\"x", "EXPOSE 99999", "STOPSIGNAL SIGNOPE", "LABEL x", "HEALTHCHECK", "HEALTHCHECK CMD", "HEALTHCHECK --interval=x CMD y", "ADD a b"} {
		if err := change(new(dockerspec.DockerOCIImageConfig), []string{bad}); !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
