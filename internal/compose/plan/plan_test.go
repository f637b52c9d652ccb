package plan

import (
	"context"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/compose-spec/compose-go/v2/cli"
	"github.com/compose-spec/compose-go/v2/types"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/internal/compose/model"
)

var update = flag.Bool("update", false, "write the golden files anew")

// situation is the second part of a case's file: what there is, in short.
type situation struct {
	// Containers that exist; Config says "changed" for another configuration.
	Containers []struct {
		ID, Service, State, Config, Image, Name, Replace string
		Number                                           int
		OneOff                                           bool
		Networks, Volumes                                []string
	}
	// Networks and Volumes by key: "", or "changed".
	Networks, Volumes map[string]string
	Images            map[string]string
	Do                string
	Services          []string
	Options           UpOptions
	RemoveVolumes     bool
	RemoveOrphans     bool
}

// TestPlans holds decisions: each file has a Compose file, what there is, and the
// plan that follows.
func TestPlans(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) < 10 {
		t.Fatalf("found %d cases: %v", len(files), err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			b, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			parts := strings.SplitN(string(b), "---\n", 3)
			if len(parts) < 2 {
				t.Fatal("a case has a Compose file, ---, JSON, --- and a plan")
			}
			p := load(t, parts[0])
			var s situation
			dec := json.NewDecoder(strings.NewReader(parts[1]))
			dec.DisallowUnknownFields()
			if err := dec.Decode(&s); err != nil {
				t.Fatal(err)
			}
			got := decide(t, p, &s)
			if *update {
				if err := os.WriteFile(f, []byte(parts[0]+"---\n"+parts[1]+"---\n"+got), 0o644); err != nil {
					t.Fatal(err)
				}
				return
			}
			if want := parts[2]; got != want {
				t.Errorf("got\n%swant\n%s", got, want)
			}
		})
	}
}

func load(t *testing.T, yaml string) *types.Project {
	t.Helper()
	file := filepath.Join(t.TempDir(), "compose.yaml")
	if err := os.WriteFile(file, []byte(yaml), 0o644); err != nil {
		t.Fatal(err)
	}
	o, err := cli.NewProjectOptions([]string{file}, cli.WithName("p"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := o.LoadProject(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// observed makes up what the engine would say.
func observed(t *testing.T, p *types.Project, s *situation) Observed {
	t.Helper()
	o := Observed{Networks: map[string]Object{}, Volumes: map[string]Object{}, Images: map[string]string{}}
	for key, what := range s.Networks {
		h, err := model.NetworkHash(p.Networks[key])
		if err != nil {
			t.Fatal(err)
		}
		o.Networks[key] = Object{ID: "net-" + key, Labels: map[string]string{model.LabelProject: p.Name, model.LabelNetwork: key, model.LabelHash: h + what}}
	}
	for key, what := range s.Volumes {
		h, err := model.VolumeHash(p.Volumes[key])
		if err != nil {
			t.Fatal(err)
		}
		o.Volumes[key] = Object{ID: p.Volumes[key].Name, Labels: map[string]string{model.LabelProject: p.Name, model.LabelVolume: key, model.LabelHash: h + what}}
	}
	o.Images = s.Images
	for _, c := range s.Containers {
		var x container.Summary
		x.ID = c.ID + strings.Repeat("0", 64-len(c.ID))
		x.State = container.ContainerState(c.State)
		x.Labels = map[string]string{model.LabelProject: p.Name, model.LabelService: c.Service, model.LabelOneOff: "False", model.LabelImage: c.Image}
		if c.OneOff {
			x.Labels[model.LabelOneOff] = "True"
		}
		svc, known := p.Services[c.Service]
		if c.Number > 0 {
			x.Labels[model.LabelNumber] = string(rune('0' + c.Number))
		}
		if c.Name == "" {
			svc.Name = c.Service
			c.Name = model.ContainerName(p.Name, &svc, "-", c.Number)
		}
		x.Names = []string{"/" + c.Name}
		if c.Replace != "" {
			x.Labels[model.LabelReplace] = c.Replace
		}
		if known {
			r, err := Resolve(svc, func(d string) (string, bool) { return First(o.Containers, d) })
			if err != nil {
				t.Fatal(err)
			}
			h, err := model.ServiceHash(r)
			if err != nil {
				t.Fatal(err)
			}
			x.Labels[model.LabelHash] = h + c.Config
		}
		x.NetworkSettings = &container.NetworkSettingsSummary{Networks: map[string]*network.EndpointSettings{}}
		nets := c.Networks
		if nets == nil {
			nets = svc.NetworksByPriority()
		}
		for _, n := range nets {
			x.NetworkSettings.Networks[n] = &network.EndpointSettings{NetworkID: "net-" + n}
		}
		vols := c.Volumes
		if vols == nil {
			for _, v := range svc.Volumes {
				vols = append(vols, v.Source)
			}
		}
		for _, v := range vols {
			x.Mounts = append(x.Mounts, container.MountPoint{Type: mount.TypeVolume, Name: p.Volumes[v].Name})
		}
		o.Containers = append(o.Containers, x)
	}
	return o
}

func decide(t *testing.T, p *types.Project, s *situation) string {
	t.Helper()
	o := observed(t, p, s)
	var pl *Plan
	var err error
	switch s.Do {
	case "", "up":
		s.Options.Separator, s.Options.Services = "-", s.Services
		if len(s.Services) > 0 {
			if p, err = p.WithSelectedServices(s.Services); err != nil {
				t.Fatal(err)
			}
		}
		pl, err = Up(p, o, s.Options)
	case "start":
		pl, err = Up(p, o, UpOptions{Separator: "-", NoCreate: true})
	case "down":
		d := DownOptions{Services: s.Services, Volumes: s.RemoveVolumes, RemoveOrphans: s.RemoveOrphans}
		for k := range s.Networks {
			d.NetworksFound = append(d.NetworksFound, k)
		}
		for k := range s.Volumes {
			d.VolumesFound = append(d.VolumesFound, k)
		}
		slices.Sort(d.NetworksFound)
		slices.Sort(d.VolumesFound)
		pl, err = Down(p, o, d)
	case "stop":
		pl, err = Stops(p, o, s.Services)
	case "restart":
		pl, err = Restarts(p, o, RestartOptions{Services: s.Services})
	default:
		t.Fatalf("cannot do %q", s.Do)
	}
	if err != nil {
		return "error: " + err.Error() + "\n"
	}
	checkGraph(t, pl)
	return pl.String()
}

// checkGraph wants every step to come after those that it waits for: then plans
// cannot get stuck.
func checkGraph(t *testing.T, pl *Plan) {
	t.Helper()
	for i, s := range pl.Steps {
		if s.ID != i {
			t.Errorf("step %d has the number %d", i, s.ID)
		}
		for _, a := range s.After {
			if a < 0 || a >= i {
				t.Errorf("step %d comes after step %d", i, a)
			}
		}
	}
}

func TestOrderRefusesCircles(t *testing.T) {
	p := &types.Project{Services: types.Services{}}
	for a, b := range map[string]string{"a": "b", "b": "c", "c": "a"} {
		p.Services[a] = types.ServiceConfig{Name: a, WorkloadSpec: types.WorkloadSpec{DependsOn: types.DependsOnConfig{b: {}}}}
	}
	if _, err := Order(p); err == nil || !strings.Contains(err.Error(), "a -> b -> c -> a") {
		t.Errorf("got %v", err)
	}
}
