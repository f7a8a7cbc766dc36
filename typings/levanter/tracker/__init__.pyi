from levanter.tracker.background import BackgroundTracker as BackgroundTracker
from levanter.tracker.tracker import CompositeTracker as CompositeTracker
from levanter.tracker.tracker import NoopConfig as NoopConfig
from levanter.tracker.tracker import NoopTracker as NoopTracker
from levanter.tracker.tracker import Tracker as Tracker
from levanter.tracker.tracker import TrackerConfig as TrackerConfig
from levanter.tracker.tracker_fns import current_tracker as current_tracker
