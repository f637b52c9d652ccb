package native

import (
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
)

// TestRemovalRaces removes what others are just beginning to use. Whoever comes second is told so;
// nobody meets half of something, and what was made is whole.
func TestRemovalRaces(t *testing.T) {
	e := start(t)
	s := &apiStorm{e: e, counts: map[int]int{}}
	must := func(method, path, body string) answer {
		t.Helper()
		a := s.ask(method, path, body)
		if a.err != nil || a.status >= 300 {
			t.Fatalf("%s %s: %d %s %v", method, path, a.status, a.body, a.err)
		}
		return a
	}
	must("POST", "/containers/create?name=src", `{"Image":"bb","Cmd":["true"]}`)
	sleeper := func(name, more string) string {
		return must("POST", "/containers/create?name="+name, `{"Image":"bb","Cmd":["sleep","1000"],"HostConfig":{`+more+`}}`).id()
	}
	sleeper("net", `"NetworkMode":"none"`)
	for _, c := range []struct {
		name    string
		before  func(i int)
		use     [3]string // method, path, body
		remove  [2]string
		usable  func(i int) // after the use was answered well
		after   func(i int)
		allowed string // statuses of either
	}{
		{"an image, by a creation", func(i int) { must("POST", fmt.Sprintf("/commit?container=src&repo=img%d&comment=%d", i, i), "{}") },
			[3]string{"POST", "/containers/create?name=x%d", `{"Image":"img%d","Cmd":["true"],"HostConfig":{"NetworkMode":"none"}}`}, [2]string{"DELETE", "/images/img%d?force=1"},
			func(i int) { must("POST", fmt.Sprintf("/containers/x%d/start", i), "") },
			func(i int) {
				s.ask("DELETE", fmt.Sprintf("/containers/x%d?force=1", i), "")
				s.ask("DELETE", fmt.Sprintf("/images/img%d?force=1", i), "")
			}, "200 201 404 409"},
		{"a network, by a connection", func(i int) { must("POST", "/networks/create", fmt.Sprintf(`{"Name":"n%d"}`, i)) },
			[3]string{"POST", "/networks/n%d/connect", `{"Container":"src"}`}, [2]string{"DELETE", "/networks/n%d"}, nil,
			func(i int) {
				s.ask("POST", fmt.Sprintf("/networks/n%d/disconnect", i), `{"Container":"src","Force":true}`)
				s.ask("DELETE", fmt.Sprintf("/networks/n%d", i), "")
			}, "200 204 403 404 409"},
		{"a network, by a start", func(i int) {
			must("POST", "/networks/create", fmt.Sprintf(`{"Name":"n%d"}`, i))
			sleeper(fmt.Sprintf("x%d", i), fmt.Sprintf(`"NetworkMode":"n%d"`, i))
		}, [3]string{"POST", "/containers/x%d/start", ""}, [2]string{"DELETE", "/networks/n%d"}, nil,
			func(i int) {
				must("DELETE", fmt.Sprintf("/containers/x%d?force=1", i), "")
				s.ask("DELETE", fmt.Sprintf("/networks/n%d", i), "")
			}, "204 403 404 409"},
		{"a volume, by a creation", func(i int) { must("POST", "/volumes/create", fmt.Sprintf(`{"Name":"v%d"}`, i)) },
			[3]string{"POST", "/containers/create?name=x%d", `{"Image":"bb","Cmd":["true"],"HostConfig":{"NetworkMode":"none","Binds":["v%d:/v"]}}`}, [2]string{"DELETE", "/volumes/v%d?force=1"},
			func(i int) { must("POST", fmt.Sprintf("/containers/x%d/start", i), "") },
			func(i int) {
				must("DELETE", fmt.Sprintf("/containers/x%d?force=1", i), "")
				s.ask("DELETE", fmt.Sprintf("/volumes/v%d", i), "")
			}, "201 204 404 409"},
		{"a container, by its start", func(i int) { sleeper(fmt.Sprintf("x%d", i), `"NetworkMode":"none"`) },
			[3]string{"POST", "/containers/x%d/start", ""}, [2]string{"DELETE", "/containers/x%d?force=1"}, nil, func(int) {}, "204 404 409"},
		{"a container, by a commit", func(i int) { sleeper(fmt.Sprintf("x%d", i), `"NetworkMode":"none"`) },
			[3]string{"POST", "/commit?container=x%d&repo=made%d", "{}"}, [2]string{"DELETE", "/containers/x%d?force=1"}, nil,
			func(i int) { s.ask("DELETE", fmt.Sprintf("/images/made%d?force=1", i), "") }, "201 204 404 409"},
		{"a container, by an exec", func(i int) {
			must("POST", "/containers/"+sleeper(fmt.Sprintf("x%d", i), `"NetworkMode":"none"`)+"/start", "")
		}, [3]string{"POST", "/containers/x%d/exec", `{"Cmd":["true"]}`}, [2]string{"DELETE", "/containers/x%d?force=1"}, nil, func(int) {}, "201 204 404 409"},
	} {
		t.Run(c.name, func(t *testing.T) {
			for i := range pick(12, 150) {
				c.before(i)
				fill := func(x string) string { return strings.ReplaceAll(x, "%d", fmt.Sprint(i)) }
				var wg sync.WaitGroup
				var used answer
				removals := make([]answer, 2)
				wg.Go(func() { used = s.ask(c.use[0], fill(c.use[1]), fill(c.use[2])) })
				for k := range removals {
					wg.Go(func() { removals[k] = s.ask(c.remove[0], fill(c.remove[1]), "") })
				}
				wg.Wait()
				for _, a := range append(removals, used) {
					if a.err != nil || !strings.Contains(c.allowed, fmt.Sprint(a.status)) {
						t.Errorf("%d: %d %s %v", i, a.status, a.body, a.err)
					}
				}
				if c.usable != nil && used.status < 300 {
					c.usable(i)
				}
				c.after(i)
			}
		})
	}
	if a := s.ask("GET", "/_ping", ""); a.status != http.StatusOK {
		t.Errorf("the engine does not answer: %v", a)
	}
}

func (a answer) id() string { return ids.FindString(string(a.body)) }
